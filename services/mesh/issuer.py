"""An issuer of tokens for development: signs with a key of its own, kept in a folder that only its owner can read.

It stands for one URL only, the one in istio/components/jwt: the control plane takes the public keys of that URL from
here. In a cluster an identity provider does this.
"""

import base64
import json
import secrets
from datetime import datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Self

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from services.mesh.identity.authority import Unusable, write_private

ISSUER = "https://issuer.autoglm.internal"
JWKS_URI = f"{ISSUER}/.well-known/jwks.json"
AUDIENCE = "autoglm"
KEY_FILE = "key.pem"


def is_tenant(name: str) -> bool:
    """Whether the gateway takes this name from a header."""
    return 1 <= len(name) <= 64 and all("!" <= char <= "~" for char in name)


class Issuer:
    """Make it with `open`."""

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        self._key = key

    @classmethod
    def open(cls, folder: Path) -> Self:
        """The issuer whose key is in `folder`, made at the first use. Raises `Unusable`."""
        path = folder / KEY_FILE
        try:
            if not path.exists():
                _make(path)
            if path.stat().st_mode & 0o077:
                raise ValueError(f"{path} can be read by others: chmod 600")
            key = load_pem_private_key(path.read_bytes(), password=None)
            if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
                raise ValueError(f"{path} is no P-256 key")
        except (OSError, ValueError) as error:
            raise Unusable(f"{folder} holds no usable token issuer ({error}); delete it to get a new one") from None
        return cls(key)

    @property
    def jwks(self) -> str:
        """The public key as a JSON Web Key Set."""
        return json.dumps({"keys": [{**self._public(), "use": "sig", "alg": "ES256", "kid": self._name()}]})

    def token(self, tenant: str, audience: str, lifetime: timedelta, now: datetime, region: str = "") -> str:
        """A token that lets `tenant` in until `lifetime` is over; `region` is where its data must stay."""
        began = int(now.timestamp())
        claims = {
            "iss": ISSUER,
            "sub": tenant,
            "aud": audience,
            "tenant": tenant,
            "iat": began,
            "nbf": began,
            "exp": began + int(lifetime.total_seconds()),
            "jti": secrets.token_hex(8),
            **({"region": region} if region else {}),
        }
        return self.sign(claims)

    def sign(self, claims: object) -> str:
        """Any claims, as a compact JSON Web Signature (RFC 7515)."""
        header = {"alg": "ES256", "typ": "JWT", "kid": self._name()}
        text = ".".join(_encoded(json.dumps(part).encode()) for part in (header, claims))
        r, s = decode_dss_signature(self._key.sign(text.encode(), ec.ECDSA(hashes.SHA256())))
        return f"{text}.{_encoded(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"

    def _public(self) -> dict[str, str]:
        point = self._key.public_key().public_numbers()
        x, y = (_encoded(value.to_bytes(32, "big")) for value in (point.x, point.y))
        return {"crv": "P-256", "kty": "EC", "x": x, "y": y}

    def _name(self) -> str:
        """The key's thumbprint (RFC 7638)."""
        return _encoded(sha256(json.dumps(self._public(), sort_keys=True, separators=(",", ":")).encode()).digest())


def _make(path: Path) -> None:
    """Complete or not at all; of two programs that begin together the first one's stays."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    key = ec.generate_private_key(ec.SECP256R1())
    write_private(draft, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    try:
        path.hardlink_to(draft)
    except FileExistsError:
        pass
    finally:
        draft.unlink()


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
