"""The development issuer: one key, readable by its owner only, and tokens that say what they should."""

import base64
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from typer.testing import CliRunner

from services.mesh.__main__ import app
from services.mesh.clouds.__main__ import app as clouds
from services.mesh.identity import Unusable
from services.mesh.issuer import AUDIENCE, ISSUER, JWKS_URI, Issuer
from services.mesh.policy.security_values import why_not_keys

ROOT = Path(__file__).resolve().parents[3]


def decoded(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def test_the_key_is_made_once_and_nobody_else_reads_it(tmp_path: Path) -> None:
    """Two programs that open the same folder sign with the same key."""
    first = Issuer.open(tmp_path / "issuer")
    assert Issuer.open(tmp_path / "issuer").jwks == first.jwks
    assert [path.name for path in (tmp_path / "issuer").iterdir()] == ["key.pem"]
    assert (tmp_path / "issuer" / "key.pem").stat().st_mode & 0o777 == 0o600
    assert why_not_keys(first.jwks) is None


def test_a_key_that_others_can_read_is_not_used(tmp_path: Path) -> None:
    """The message names the file and the remedy."""
    Issuer.open(tmp_path)
    (tmp_path / "key.pem").chmod(0o644)
    with pytest.raises(Unusable, match=r"key.pem can be read by others: chmod 600"):
        Issuer.open(tmp_path)


def test_a_broken_key_is_named(tmp_path: Path) -> None:
    """What lies there instead of a key is not replaced in silence."""
    (tmp_path / "key.pem").write_text("nothing")
    (tmp_path / "key.pem").chmod(0o600)
    with pytest.raises(Unusable, match="no usable token issuer"):
        Issuer.open(tmp_path)


def test_a_token_says_who_for_whom_and_how_long(tmp_path: Path) -> None:
    """And its signature fits the published key."""
    issuer, now = Issuer.open(tmp_path), datetime(2026, 1, 2, tzinfo=UTC)
    token = issuer.token("acme", AUDIENCE, timedelta(minutes=5), now)
    head, body, signature = token.split(".")
    claims = json.loads(decoded(body))
    assert (claims["iss"], claims["sub"], claims["tenant"], claims["aud"]) == (ISSUER, "acme", "acme", AUDIENCE)
    assert claims["exp"] - claims["nbf"] == 300 and claims["nbf"] == now.timestamp()
    (key,) = json.loads(issuer.jwks)["keys"]
    assert json.loads(decoded(head)) == {"alg": "ES256", "typ": "JWT", "kid": key["kid"]}
    x, y = (int.from_bytes(decoded(key[name]), "big") for name in ("x", "y"))
    raw = decoded(signature)
    made = encode_dss_signature(int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big"))
    public = ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key()
    public.verify(made, f"{head}.{body}".encode(), ec.ECDSA(hashes.SHA256()))


def test_the_component_names_this_issuer() -> None:
    """What the verb signs is what the component believes, from the URL that stands for it."""
    text = (ROOT / "istio" / "components" / "jwt" / "tokens.yaml").read_text()
    assert f"issuer: {ISSUER}\n" in text and f"jwksUri: {JWKS_URI}\n" in text and f"notValues: [{AUDIENCE}]" in text


def test_the_verb_prints_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else on standard output; a name that the gateway would refuse is refused."""
    monkeypatch.setenv("AUTOGLM_RUN_DIR", str(tmp_path))
    done = CliRunner().invoke(app, ["token", "--tenant", "acme", "--minutes", "1"])
    assert done.exit_code == 0
    claims = json.loads(decoded(done.stdout.strip().split(".")[1]))
    assert claims["tenant"] == "acme" and claims["exp"] - claims["iat"] == 60
    assert (tmp_path / "issuer" / "key.pem").exists()
    assert CliRunner().invoke(app, ["token", "--tenant", "a b"]).exit_code == 1


def test_the_clouds_share_one_issuer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its key is in their run directory, or where the setting says; the region is part of the token only if named."""
    monkeypatch.setenv("AUTOGLM_CLOUDS_DIR", str(tmp_path))
    done = CliRunner().invoke(clouds, ["token", "--tenant", "acme", "--region", "azure"])
    assert done.exit_code == 0
    claims = json.loads(decoded(done.stdout.strip().split(".")[1]))
    assert (claims["tenant"], claims["region"], claims["aud"]) == ("acme", "azure", AUDIENCE)
    assert (tmp_path / "issuer" / "key.pem").exists()
    monkeypatch.setenv("AUTOGLM_ISSUER_DIR", str(tmp_path / "elsewhere"))
    done = CliRunner().invoke(clouds, ["token"])
    assert "region" not in json.loads(decoded(done.stdout.strip().split(".")[1]))
    assert (tmp_path / "elsewhere" / "key.pem").exists()
    assert CliRunner().invoke(clouds, ["token", "--tenant", "a b"]).exit_code == 1
