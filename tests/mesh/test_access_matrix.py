"""Every identity against every method of every service, through a real Envoy with real certificates.

Expected is the table of `services/mesh/access_table.py`; the Envoy has the translator's listeners. To show that no rule
of istio/base is idle, each is also left out: whatever the matrix says without it must differ from the table.
"""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from services.mesh import access_table
from services.mesh.access_table import ACCOUNTS, NAMESPACE, SERVICES, is_allowed
from services.mesh.identity import Authority
from services.mesh.policy import Policy, load
from services.mesh.policy.security import AuthorizationPolicy
from services.mesh.registry import Workload, spiffe_id
from tests.fakes.access_world import AccessWorld, Asked, Outcome, Reply

BASE = Path(__file__).resolve().parents[2] / "istio" / "base"
POLICY = load(BASE)
NEWCOMER = Workload("newcomer", NAMESPACE, "newcomer", {"app": "newcomer"})
"""A service that nobody has written a policy for."""
DOOR = Workload("ingress", NAMESPACE, "ingress", {"istio": "ingressgateway"})
WORKLOADS = {**{name: access_table.workload(name) for name in SERVICES}, "newcomer": NEWCOMER}
CALLS = tuple(dict.fromkeys(call for name in SERVICES for call in access_table.calls(name)))
REQUESTS = tuple(Asked(call.verb, call.path) for call in CALLS)
CALLERS = (
    *(spiffe_id(NAMESPACE, account) for account in ACCOUNTS),
    spiffe_id(NAMESPACE, "eastwest"),
    spiffe_id(NAMESPACE, "stranger"),
    spiffe_id(NAMESPACE, "gateway-2"),
    spiffe_id("other", "gateway"),
    "spiffe://other.example/ns/autoglm/sa/gateway",
    "spiffe://cluster.local/ns/autoglm/sa/gateway/more",
    "nobody",
    "plain text",
)
Matrix = dict[tuple[str, str, str], Outcome]
"""Caller, verb and path → what became of it."""
Mutant = tuple[str, Policy, str]
"""What was left out, the policy without it, and the workload that must notice."""


def without(item: AuthorizationPolicy, rule: int, path: str | None) -> Policy:
    """The policy without one rule, or without one path of it."""
    rules = list(item.spec.rules)
    if path is None:
        del rules[rule]
    else:
        to = []
        for part in rules[rule].to:
            paths = tuple(known for known in part.operation.paths if known != path)
            if paths:
                to.append(part.model_copy(update={"operation": part.operation.model_copy(update={"paths": paths})}))
        rules[rule] = rules[rule].model_copy(update={"to": tuple(to)})
        if not to:
            del rules[rule]
    smaller = item.model_copy(update={"spec": item.spec.model_copy(update={"rules": tuple(rules)})})
    return replaced(item, smaller)


def replaced(item: AuthorizationPolicy, new: AuthorizationPolicy | None) -> Policy:
    kept = [
        other for other in (new if old is item else old for old in POLICY.authorization_policies) if other is not None
    ]
    return Policy(peer_authentications=POLICY.peer_authentications, authorization_policies=tuple(kept))


def mutants() -> Iterator[Mutant]:
    for item in POLICY.authorization_policies:
        app = item.spec.selector.match_labels.get("app", "")
        if not item.spec.rules:
            yield f"{item.metadata.name} (the object)", replaced(item, None), app or "newcomer"
        for number, rule in enumerate(item.spec.rules):
            label = f"{item.metadata.name} rule {number}"
            yield label, without(item, number, None), app or "door"
            for path in (path for part in rule.to for path in part.operation.paths):
                yield f"{label} {path}", without(item, number, path), app
    plain = Policy(authorization_policies=POLICY.authorization_policies)
    yield "PeerAuthentication", plain, "cache"


MUTANTS = tuple(mutants())


class Stage:
    """The listeners of the policy as it is, and one for each mutant."""

    def __init__(self, directory: Path) -> None:
        self.world = AccessWorld(directory)
        self.ports = {name: self.world.sidecar(POLICY, workload) for name, workload in WORKLOADS.items()}
        self.door = self.world.door(POLICY, DOOR)
        self.mutants = [
            self.world.door(policy, DOOR) if name == "door" else self.world.sidecar(policy, WORKLOADS[name])
            for _, policy, name in MUTANTS
        ]
        self.world.start()

    def row(self, port: int, caller: str) -> Matrix:
        """One caller with every request at one listener."""
        tls = {"nobody": self.world.anonymous(), "plain text": None}
        how = tls[caller] if caller in tls else self.world.caller(caller)
        replies = self.world.ask(port, how, REQUESTS)
        return {(caller, asked.verb, asked.path): reply.outcome for asked, reply in zip(REQUESTS, replies, strict=True)}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    made = Stage(tmp_path_factory.mktemp("access"))
    yield made
    made.world.stop()


def expected(workload: Workload, caller: str) -> Matrix:
    """What the table says. Without a certificate there is no connection, so no answer either."""
    if caller in ("nobody", "plain text"):
        return {(caller, call.verb, call.path): "closed" for call in CALLS}
    return {
        (caller, call.verb, call.path): "reached" if is_allowed(POLICY, workload, caller, call) else "denied"
        for call in CALLS
    }


def different(found: Matrix, wanted: Matrix) -> list[str]:
    return [f"{key}: {found[key]}, not {wanted[key]}" for key in wanted if found[key] != wanted[key]]


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_identity_and_method(name: str, stage: Stage) -> None:
    """Allowed exactly where the table says, for every caller and every path of the whole mesh at every service."""
    allowed = 0
    for caller in CALLERS:
        wanted = expected(WORKLOADS[name], caller)
        assert not different(stage.row(stage.ports[name], caller), wanted)
        allowed += list(wanted.values()).count("reached")
    assert bool(allowed) == (name != "newcomer")  # a table that allows nothing would be easily met


def test_the_door_stands_open(stage: Stage) -> None:
    """Whom the door lets in is decided behind it: anybody may ask, without a certificate."""
    assert {reply.outcome for reply in stage.world.ask(stage.door, None, REQUESTS)} == {"reached"}


@pytest.mark.parametrize("number", range(len(MUTANTS)), ids=[label for label, _, _ in MUTANTS])
def test_nothing_in_the_manifests_is_idle(number: int, stage: Stage) -> None:
    """Without any one rule, path or object the matrix is another one: the test above would fail."""
    _, _, name = MUTANTS[number]
    port = stage.mutants[number]
    if name == "door":
        assert {reply.outcome for reply in stage.world.ask(port, None, REQUESTS)} == {"denied"}
    else:
        wanted = {caller: expected(WORKLOADS[name], caller) for caller in CALLERS}
        likely = sorted(CALLERS, key=lambda caller: "reached" not in wanted[caller].values() and caller != "plain text")
        assert any(different(stage.row(port, caller), wanted[caller]) for caller in likely)


ENCODE = "/autoglm.tokenizer.v1.TokenizerService/Encode"
DECODE = "/autoglm.tokenizer.v1.TokenizerService/Decode"


@pytest.mark.parametrize(
    "path",
    [
        f"/{DECODE}",
        DECODE.replace("/Dec", "//Dec"),
        f"{DECODE}/",
        DECODE.replace("/Dec", "%2fDec"),
        DECODE.replace("/Dec", "%2FDec"),
        DECODE.replace("/Dec", "\\Dec"),
        DECODE.replace("D", "%44"),
        DECODE.lower(),
        f"{ENCODE}/../Decode",
        f"{ENCODE}/%2e%2e/Decode",
        f"{ENCODE}%2f..%2fDecode",
        f"{ENCODE}/..;/Decode",
        f"{ENCODE}%00/Decode",
        f"{DECODE}?{ENCODE}",
        f"{DECODE};{ENCODE}",
        f"{DECODE}#{ENCODE}",
        f"{ENCODE}Stream",
        f"http://mesh{DECODE}",
        "*",
    ],
)
def test_a_path_cannot_be_dressed_up(path: str, stage: Stage) -> None:
    """A worker may call Encode and not Decode, however it writes that."""
    tls = stage.world.caller(spiffe_id(NAMESPACE, "sparse-inference"))
    (reply,) = stage.world.ask(stage.ports["tokenizer"], tls, [Asked("POST", path)])
    assert reply.outcome in ("denied", "refused"), reply


def test_other_verbs_are_refused(stage: Stage) -> None:
    """gRPC is POST; the REST paths take the verbs they have."""
    worker = stage.world.caller(spiffe_id(NAMESPACE, "sparse-inference"))
    verbs = [Asked(verb, ENCODE) for verb in ("GET", "PUT", "DELETE", "OPTIONS", "PATCH")]
    assert {reply.outcome for reply in stage.world.ask(stage.ports["tokenizer"], worker, verbs)} == {"denied"}
    ingress = stage.world.caller(spiffe_id(NAMESPACE, "ingress"))
    rest = [Asked("GET", "/v1/completions"), Asked("DELETE", "/v1/models/glm-tiny"), Asked("POST", "/health")]
    assert {reply.outcome for reply in stage.world.ask(stage.ports["gateway"], ingress, rest)} == {"denied"}


def test_a_refusal_is_a_grpc_status(stage: Stage) -> None:
    """A gRPC caller sees PERMISSION_DENIED."""
    tls = stage.world.caller(spiffe_id(NAMESPACE, "cache"))
    asked = Asked("POST", ENCODE, (("content-type", "application/grpc"),))
    (reply,) = stage.world.ask(stage.ports["tokenizer"], tls, [asked])
    assert reply.headers["grpc-status"] == "7"


def test_certificates_of_others_open_no_connection(stage: Stage) -> None:
    """The right name signed by another authority, and the right authority after the end, are worth nothing."""
    name = spiffe_id(NAMESPACE, "gateway")
    stranger = Authority.create(timedelta(days=1), datetime.now(UTC))
    ended = stage.world.caller(name, lifetime=timedelta(minutes=-1))
    for tls in (stage.world.caller(name, stranger), ended):
        replies: list[Reply] = stage.world.ask(stage.ports["tokenizer"], tls, [Asked("POST", ENCODE)])
        assert [reply.outcome for reply in replies] == ["closed"]


def test_a_header_is_no_certificate(stage: Stage) -> None:
    """x-forwarded-client-cert is what proxies tell each other; a caller who writes it gains nothing."""
    tls = stage.world.caller(spiffe_id(NAMESPACE, "cache"))
    claimed = (("x-forwarded-client-cert", f"URI={spiffe_id(NAMESPACE, 'gateway')}"),)
    (reply,) = stage.world.ask(stage.ports["tokenizer"], tls, [Asked("POST", ENCODE, claimed)])
    assert reply.outcome == "denied"
