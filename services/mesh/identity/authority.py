"""The authority that signs the mesh's certificates: SPIFFE ids in X.509, elliptic keys, short lives.

Its key lies in a folder that only its owner can read; several meshes that share the folder trust each other. In a
cluster istiod does this. Who needs which certificate, and when, is not known here.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

KEY_FILE, CERTIFICATE_FILE = "key.pem", "root.pem"
CLOCK_SKEW = timedelta(minutes=2)
"""Certificates begin this much earlier, for machines whose clocks differ (Istio's value)."""


class Unusable(Exception):
    """The authority's folder cannot be used; the text names it and the remedy."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """A certificate and its key, as PEM."""

    chain: bytes
    key: bytes
    serial: str
    issued: datetime
    expires: datetime


class Authority:
    """Signs. Make it with `open` or `create`."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, root: x509.Certificate) -> None:
        self._key, self._root = key, root

    @classmethod
    def open(cls, folder: Path, lifetime: timedelta, now: datetime) -> Self:
        """The authority in `folder`, made at the first use. Raises `Unusable`."""
        try:
            if not (folder / KEY_FILE).exists():
                _make(folder, *_new_root(lifetime, now))
            return cls._load(folder, now)
        except (OSError, ValueError) as error:
            raise Unusable(
                f"{folder} holds no usable authority ({error}); delete the folder to get a new one"
            ) from None

    @classmethod
    def create(cls, lifetime: timedelta, now: datetime) -> Self:
        """An authority in memory."""
        return cls(*_new_root(lifetime, now))

    @property
    def root(self) -> bytes:
        """The certificate that members trust, as PEM."""
        return self._root.public_bytes(Encoding.PEM)

    @property
    def expires(self) -> datetime:
        """When it can sign no more."""
        return self._root.not_valid_after_utc

    def issue(self, identity: str, lifetime: timedelta, now: datetime) -> Certificate:
        """A certificate for one SPIFFE id, with a key of its own; it never outlives the authority."""
        key = ec.generate_private_key(ec.SECP256R1())
        expires = min(now + lifetime, self.expires)
        usages = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(self._root.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - CLOCK_SKEW)
            .not_valid_after(expires)
            # Critical, as the subject is empty: whoever does not know URIs must refuse it (RFC 5280, 4.2.1.6).
            .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity)]), critical=True)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(is_root=False), critical=True)
            .add_extension(usages, critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        serial = f"{certificate.serial_number:x}"
        return Certificate(certificate.public_bytes(Encoding.PEM), _pem(key), serial, now, expires)

    @classmethod
    def _load(cls, folder: Path, now: datetime) -> Self:
        private = folder / KEY_FILE
        if private.stat().st_mode & 0o077:
            raise ValueError(f"{private} can be read by others: chmod 600")
        key = load_pem_private_key(private.read_bytes(), password=None)
        root = x509.load_pem_x509_certificate((folder / CERTIFICATE_FILE).read_bytes())
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != root.public_key():
            raise ValueError("key and certificate do not belong together")
        if root.not_valid_after_utc <= now:
            raise ValueError(f"its certificate ended on {root.not_valid_after_utc:%Y-%m-%d}")
        return cls(key, root)


def _new_root(lifetime: timedelta, now: datetime) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "cluster.local")])
    root = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + lifetime)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(is_root=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return key, root


def _make(folder: Path, key: ec.EllipticCurvePrivateKey, root: x509.Certificate) -> None:
    """Complete or not at all; of two meshes that begin together the first one's stays."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        write_private(draft / KEY_FILE, _pem(key))
        (draft / CERTIFICATE_FILE).write_bytes(root.public_bytes(Encoding.PEM))
        try:
            draft.rename(folder)
        except OSError:
            if not (folder / KEY_FILE).exists():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write_private(path: Path, content: bytes) -> None:
    """A file that only its owner can read, from its first byte on."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _key_usage(*, is_root: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_root,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_root,
        crl_sign=is_root,
        encipher_only=False,
        decipher_only=False,
    )
