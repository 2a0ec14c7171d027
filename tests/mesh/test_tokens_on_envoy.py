"""The door under istio/components/jwt, on a real Envoy: which tokens open it, and what the gateway then hears."""

import asyncio
import base64
import hmac
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from services.mesh.issuer import AUDIENCE, ISSUER, JWKS_URI, Issuer
from services.mesh.keys import Keys
from services.mesh.policy import Policy, load
from services.mesh.registry import Workload
from tests.fakes.access_world import TENANT, AccessWorld, Asked, Reply

ISTIO = Path(__file__).resolve().parents[2] / "istio"
DOOR = Workload("ingress", "autoglm", "ingress", {"istio": "ingressgateway"})
GENERATE = "/autoglm.gateway.v1.GatewayService/Generate"
NOW = int(time.time())
GOOD: dict[str, Any] = {
    "iss": ISSUER,
    "sub": "alice",
    "aud": AUDIENCE,
    "tenant": "acme",
    "iat": NOW,
    "nbf": NOW,
    "exp": NOW + 3600,
}


def encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def claims(**changes: Any) -> dict[str, Any]:
    """Good claims with some of them changed, or left out where the change is None."""
    return {name: value for name, value in {**GOOD, **changes}.items() if value is not None}


def resigned(token: str, header: dict[str, Any], secret: bytes | None) -> str:
    """The same claims under another header, signed with a shared secret or not at all."""
    text = f"{encoded(json.dumps(header).encode())}.{token.split('.')[1]}"
    signature = encoded(hmac.new(secret, text.encode(), sha256).digest()) if secret is not None else ""
    return f"{text}.{signature}"


class Stage:
    """One door as the component makes it, one for each of its parts left out, and one whose issuer was unreachable."""

    def __init__(self, directory: Path) -> None:
        self.issuer = Issuer.open(directory / "issuer")
        self.other = Issuer.open(directory / "other")
        files = directory / "istio"
        shutil.copytree(ISTIO / "base", files)
        shutil.copy(ISTIO / "components" / "jwt" / "tokens.yaml", files)
        (files / "kustomization.yaml").unlink(missing_ok=True)
        loaded = load(files)
        policy = asyncio.run(Keys({JWKS_URI: lambda: self.issuer.jwks}).filled(loaded))
        self.world = AccessWorld(directory)
        self.door = self.world.door(policy, DOOR)
        self.without_rule = [self.world.door(self._without(policy, number), DOOR) for number in range(3)]
        self.without_keys = self.world.door(loaded, DOOR)
        self.without_authentication = self.world.door(replace(policy, request_authentications=()), DOOR)
        self.world.start()

    @staticmethod
    def _without(policy: Policy, number: int) -> Policy:
        kept = []
        for item in policy.authorization_policies:
            if item.metadata.name == "tokens":
                rules = tuple(rule for index, rule in enumerate(item.spec.rules) if index != number)
                assert len(rules) == 2
                item = item.model_copy(update={"spec": item.spec.model_copy(update={"rules": rules})})
            kept.append(item)
        return replace(policy, authorization_policies=tuple(kept))

    def ask(self, token: str | None, *headers: tuple[str, str], path: str = GENERATE, port: int = 0) -> Reply:
        bearer = (("authorization", f"Bearer {token}"),) if token is not None else ()
        (reply,) = self.world.ask(port or self.door, None, [Asked("POST", path, (*bearer, *headers))])
        return reply


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    made = Stage(tmp_path_factory.mktemp("tokens"))
    yield made
    made.world.stop()


def test_a_good_token_opens_the_door(stage: Stage) -> None:
    """The gateway hears the tenant of the claim, and never sees the token itself."""
    token = stage.issuer.token("acme", AUDIENCE, timedelta(minutes=5), datetime.now(UTC))
    reply = stage.ask(token)
    assert reply.outcome == "reached"
    assert reply.headers["x-tenant-seen"] == "acme"
    assert reply.headers.get("x-token-seen", "") in ("", "-")


def test_one_audience_of_several_is_enough(stage: Stage) -> None:
    """`aud` may be a list."""
    assert stage.ask(stage.issuer.sign(claims(aud=["other", AUDIENCE]))).outcome == "reached"


BAD = {
    "wrong audience": claims(aud="somebody-else"),
    "wrong audiences": claims(aud=["a", "b"]),
    "no audience": claims(aud=None),
    "almost the audience": claims(aud=f"{AUDIENCE}.example"),
    "wrong issuer": claims(iss="https://issuer.example"),
    "no issuer": claims(iss=None),
    "expired": claims(exp=NOW - 3600),
    "not yet": claims(nbf=NOW + 3600),
    "no subject": claims(sub=None),
    "no tenant": claims(tenant=None),
    "empty tenant": claims(tenant=""),
}


@pytest.mark.parametrize("name", BAD)
def test_claims_that_do_not_suit(name: str, stage: Stage) -> None:
    """The issuer's own signature does not help: 401 or 403, for gRPC callers UNAUTHENTICATED or PERMISSION_DENIED."""
    token = stage.issuer.sign(BAD[name])
    assert stage.ask(token).status in (401, 403)
    assert stage.ask(token, ("content-type", "application/grpc")).headers["grpc-status"] in ("7", "16")


def forged(name: str, stage: Stage) -> str | None:
    good = stage.issuer.sign(claims())
    head, body, signature = good.split(".")
    kid = json.loads(base64.urlsafe_b64decode(head + "=="))["kid"]
    public = json.loads(stage.issuer.jwks)["keys"][0]
    match name:
        case "missing":
            return None
        case "empty":
            return ""
        case "alg none":
            return resigned(good, {"alg": "none", "typ": "JWT", "kid": kid}, None)
        case "alg None":
            return resigned(good, {"alg": "None", "kid": kid}, None)
        case "no alg":
            return resigned(good, {"typ": "JWT", "kid": kid}, None)
        case "HS256 with the public key":
            return resigned(good, {"alg": "HS256", "kid": kid}, json.dumps(public).encode())
        case "HS256 with the public point":
            return resigned(good, {"alg": "HS256", "kid": kid}, base64.urlsafe_b64decode(public["x"] + "="))
        case "unknown key":
            return stage.other.sign(claims())
        case "another key under our name":
            text = f"{head}.{body}"
            return f"{text}.{stage.other.sign(claims()).split('.')[2]}"
        case "key of its own in the header":
            mine = {"alg": "ES256", "jwk": json.loads(stage.other.jwks)["keys"][0]}
            return resigned(good, mine, b"x")
        case "changed claims":
            return f"{head}.{encoded(json.dumps(claims(tenant='mallory')).encode())}.{signature}"
        case "no signature":
            return f"{head}.{body}."
        case "signature of zeros":
            return f"{head}.{body}.{encoded(bytes(64))}"
        case "two parts":
            return f"{head}.{body}"
        case "garbage":
            return "%%% not a token at all %%%"
        case "JSON bomb":
            return f"{head}.{encoded(b'[' * 10_000)}.{signature}"
        case "oversized":
            return stage.issuer.sign(claims(padding="x" * 120_000))
    raise AssertionError(name)


@pytest.mark.parametrize(
    "name",
    [
        "missing",
        "empty",
        "alg none",
        "alg None",
        "no alg",
        "HS256 with the public key",
        "HS256 with the public point",
        "unknown key",
        "another key under our name",
        "key of its own in the header",
        "changed claims",
        "no signature",
        "signature of zeros",
        "two parts",
        "garbage",
        "JSON bomb",
        "oversized",
    ],
)
def test_tokens_that_nobody_signed(name: str, stage: Stage) -> None:
    """Refused at the door, whatever the forger tried; too large a header is refused as such."""
    reply = stage.ask(forged(name, stage))
    assert reply.status in ((401, 403) if name != "oversized" else (431,))


def test_probes_need_no_token(stage: Stage) -> None:
    """Health stays open; a token that is wrong is refused even there."""
    assert stage.ask(None, path="/grpc.health.v1.Health/Check").outcome == "reached"
    assert stage.ask(None, path="/health").outcome == "reached"
    assert stage.ask(None, path="/health/../v1/models").outcome == "denied"
    assert stage.ask("x.y.z", path="/health").status == 401


def test_nobody_names_a_tenant_himself(stage: Stage) -> None:
    """The header a client sends is gone, with a token and without."""
    token = stage.issuer.sign(claims())
    assert stage.ask(token, (TENANT, "mallory")).headers["x-tenant-seen"] == "acme"
    assert stage.ask(None, (TENANT, "mallory"), path="/health").headers.get("x-tenant-seen", "") in ("", "-")


@pytest.mark.parametrize(
    ("number", "token"), list(enumerate((claims(sub=None), claims(aud="somebody-else"), claims(tenant=None))))
)
def test_each_rule_of_the_component_is_needed(number: int, token: dict[str, Any], stage: Stage) -> None:
    """Without one rule, the token that it alone keeps out comes in."""
    signed = stage.issuer.sign(token)
    assert stage.ask(signed).outcome == "denied"
    assert stage.ask(signed, port=stage.without_rule[number]).outcome == "reached"


def test_without_authentication_no_token_is_believed(stage: Stage) -> None:
    """Rules about tokens that nobody checks allow nothing."""
    assert stage.ask(stage.issuer.sign(claims()), port=stage.without_authentication).outcome == "denied"


def test_an_issuer_out_of_reach_lets_nobody_in(stage: Stage) -> None:
    """Without its keys every token is refused, as with Istio."""
    assert stage.ask(stage.issuer.sign(claims()), port=stage.without_keys).status == 401
