"""The authority and the files it writes: what a certificate says, who can read a key, when it is renewed."""

import asyncio
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from services.mesh.identity import Authority, Identities, Terms, Unusable
from services.mesh.identity.keeper import renewal
from services.mesh.registry import spiffe_id

NOW = datetime(2026, 1, 2, tzinfo=UTC)
DAY, YEAR = timedelta(days=1), timedelta(days=365)
NAME = spiffe_id("autoglm", "cache")


def identities(folder: Path, terms: Terms | None = None) -> Identities:
    """For two accounts, with no jitter."""
    authority = Authority.create(YEAR, datetime.now(UTC))
    return Identities(folder, authority, "autoglm", {"cache", "gateway"}, terms or Terms(), lambda: None, lambda: 0.5)


def serial_of(folder: Path, account: str) -> str:
    """Of the certificate that Envoy would read now."""
    chain = x509.load_pem_x509_certificate((folder / account / "current" / "chain.pem").read_bytes())
    return f"{chain.serial_number:x}"


def test_a_certificate_names_the_account_and_nothing_else() -> None:
    """SPIFFE's profile: no subject, one critical URI, both TLS sides, not an authority; P-256; an hour's life."""
    authority = Authority.create(YEAR, NOW)
    made = authority.issue(NAME, timedelta(hours=1), NOW)
    leaf, root = x509.load_pem_x509_certificate(made.chain), x509.load_pem_x509_certificate(authority.root)
    assert list(leaf.subject) == []
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert names.critical and [name.value for name in names.value] == ["spiffe://cluster.local/ns/autoglm/sa/cache"]
    usages = set(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    assert usages == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    assert leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert root.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length == 0
    key = load_pem_private_key(made.key, password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name == "secp256r1"
    assert (made.issued, made.expires) == (NOW, NOW + timedelta(hours=1))
    leaf.verify_directly_issued_by(root)


def test_a_certificate_never_outlives_its_authority() -> None:
    """It would be refused anyway, and renewal must come in time."""
    authority = Authority.create(timedelta(hours=2), NOW)
    assert authority.issue(NAME, DAY, NOW).expires == authority.expires


def test_the_authority_is_made_once_and_its_key_is_the_owners_alone(tmp_path: Path) -> None:
    """Meshes that share the folder get the same root; the key file is 0600 and nothing half made lies beside it."""
    first = Authority.open(tmp_path / "ca", YEAR, NOW)
    assert Authority.open(tmp_path / "ca", YEAR, NOW + DAY).root == first.root
    assert (tmp_path / "ca" / "key.pem").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["ca"]


@pytest.mark.parametrize("damage", ["readable by others", "another's certificate", "expired", "no key", "not PEM"])
def test_an_unusable_authority_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    """Never replaced in silence: whoever trusts the old one would be cut off."""
    folder, now = tmp_path / "ca", NOW
    Authority.open(folder, YEAR, NOW)
    if damage == "readable by others":
        (folder / "key.pem").chmod(0o644)
    elif damage == "another's certificate":
        (folder / "root.pem").write_bytes(Authority.create(YEAR, NOW).root)
    elif damage == "expired":
        now = NOW + 2 * YEAR
    elif damage == "no key":
        (folder / "key.pem").unlink()
    else:
        (folder / "key.pem").write_text("")
    with pytest.raises(Unusable, match=str(folder)):
        Authority.open(folder, YEAR, now)


def test_the_newest_certificate_comes_by_a_renamed_link(tmp_path: Path) -> None:
    """Key and chain change together; the one before stays readable for Envoy, those before it go."""
    keeper = identities(tmp_path)
    keeper.prepare()
    serials = []
    for _ in range(4):
        keeper.rotate()
        serials.append(next(item.certificate.serial for item in keeper.issued if item.account == "cache"))
        assert serial_of(tmp_path, "cache") == serials[-1]
    assert {path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()} == {"current", *serials[-2:]}
    current = tmp_path / "cache" / "current"
    assert current.is_symlink() and (current / "key.pem").stat().st_mode & 0o777 == 0o600
    key = load_pem_private_key((current / "key.pem").read_bytes(), password=None)
    chain = x509.load_pem_x509_certificate((current / "chain.pem").read_bytes())
    assert key.public_key() == chain.public_key()


def test_what_envoy_reads_first_never_changes(tmp_path: Path) -> None:
    """`sds.json` is written once: a new file of the same content would make Envoy read everything again."""
    keeper = identities(tmp_path)
    keeper.prepare()
    before = os.stat(tmp_path / "cache" / "sds.json").st_ino
    keeper.rotate()
    assert os.stat(tmp_path / "cache" / "sds.json").st_ino == before


@pytest.mark.parametrize(("chance", "share"), [(0.0, 0.45), (0.5, 0.5), (1.0, 0.55)])
def test_renewal_comes_at_half_the_life_give_or_take(chance: float, share: float) -> None:
    """Members that started together do not renew in one moment."""
    made = Authority.create(YEAR, NOW).issue(NAME, DAY, NOW)
    assert renewal(made, chance) == NOW + DAY * share


async def test_certificates_are_renewed_by_themselves(tmp_path: Path) -> None:
    """With lives of a fifth of a second, each account has had several within one run; accounts differ in serial."""
    changes: asyncio.Queue[None] = asyncio.Queue()
    authority = Authority.create(YEAR, datetime.now(UTC))
    terms = Terms(certificate=timedelta(seconds=0.2))
    accounts = {"cache", "gateway"}
    keeper = Identities(tmp_path, authority, "autoglm", accounts, terms, lambda: changes.put_nowait(None), lambda: 0.5)
    keeper.prepare()
    run = asyncio.create_task(keeper.run())
    while min(item.count for item in keeper.issued) < 3:
        await changes.get()
    run.cancel()
    assert serial_of(tmp_path, "cache") != serial_of(tmp_path, "gateway")
