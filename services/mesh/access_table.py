"""Identity × method as the manifests have it: what docs/access.md shows, and what tests compare a real Envoy with.

Reads AuthorizationPolicy by itself, in Python, and not through the translator: two readings that agree are worth more
than one. Rules that look at more than the caller, the workload and the path of a call are not for a table: `Undecided`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from autoglm.cache.v1 import cache_pb2
from autoglm.gateway.v1 import gateway_pb2
from autoglm.scheduler.v1 import scheduler_pb2
from autoglm.sparse_inference.v1 import sparse_inference_pb2
from autoglm.third_party import ext_proc_pb2, oip_pb2
from autoglm.tokenizer.v1 import tokenizer_pb2
from google.protobuf.descriptor import FileDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from services.mesh.policy import Policy
from services.mesh.policy.security import AuthorizationPolicy, Operation, Rule, Source, concerns
from services.mesh.registry import Workload, spiffe_id

NAMESPACE = "autoglm"
REFLECTION_V1 = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
"""Not in the Python package's descriptors, which know v1alpha only; every service answers to both."""
REST = (
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/glm-tiny"),
    ("GET", "/health"),
    ("GET", "/live"),
    ("GET", "/metrics"),
)
_FILES: Mapping[str, tuple[FileDescriptor, ...]] = {
    "gateway": (gateway_pb2.DESCRIPTOR,),
    "tokenizer": (tokenizer_pb2.DESCRIPTOR,),
    "scheduler": (scheduler_pb2.DESCRIPTOR, ext_proc_pb2.DESCRIPTOR),
    "sparse-inference": (sparse_inference_pb2.DESCRIPTOR, oip_pb2.DESCRIPTOR),
    "cache": (cache_pb2.DESCRIPTOR,),
}
SERVICES = tuple(_FILES)
ACCOUNTS = ("ingress", *SERVICES)
_EVERYWHERE = (health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR)


class Undecided(Exception):
    """A rule depends on something that a table of identities and methods does not have."""


@dataclass(frozen=True, slots=True)
class Call:
    """One thing that can be asked of a workload."""

    verb: str
    path: str


def calls(service: str) -> tuple[Call, ...]:
    """Everything a service answers to: its gRPC methods, health, reflection, and the gateway's REST paths."""
    paths = [
        f"/{described.full_name}/{method.name}"
        for file in (*_FILES[service], *_EVERYWHERE)
        for described in file.services_by_name.values()
        for method in described.methods
    ]
    rest = REST if service == "gateway" else ()
    return (*(Call("POST", path) for path in (*paths, REFLECTION_V1)), *(Call(verb, path) for verb, path in rest))


def workload(service: str) -> Workload:
    """Some process of the service, as selectors see it."""
    return Workload(service, NAMESPACE, service, {"app": service})


def is_allowed(policy: Policy, target: Workload, caller: str | None, call: Call) -> bool:
    """Whether the call passes. `caller` is a SPIFFE id, None nobody. Raises `Undecided`."""
    found = [item for item in policy.authorization_policies if concerns(item, target) and not item.is_dry_run]
    if any(_matches(item, caller, call) for item in found if item.spec.action == "DENY"):
        return False
    allowing = [item for item in found if item.spec.action == "ALLOW"]
    return not allowing or any(_matches(item, caller, call) for item in allowing)


def render(policy: Policy) -> str:
    """The table as Markdown."""
    heads = " | ".join(ACCOUNTS)
    lines = [
        "# Who may call what",
        "",
        "Made from `istio/base` by `python -m services.mesh access > docs/access.md`; a test says when it is stale.",
        "Rows are everything a service answers to, columns the service accounts of the callers. What is not marked is",
        "refused with PERMISSION_DENIED. So is who is not in the table: another account, namespace or trust domain.",
        "Without a certificate of the mesh no connection comes about.",
        "",
    ]
    for service in SERVICES:
        lines += [f"## {service}", "", f"| method | {heads} |", f"| --- |{' --- |' * len(ACCOUNTS)}"]
        for call in calls(service):
            name = call.path if call.path.count("/") == 2 and "." in call.path else f"{call.verb} {call.path}"
            marks = [
                "yes" if is_allowed(policy, workload(service), spiffe_id(NAMESPACE, account), call) else ""
                for account in ACCOUNTS
            ]
            lines.append(f"| `{name}` | {' | '.join(marks)} |")
        lines.append("")
    return "\n".join(lines)


def _matches(item: AuthorizationPolicy, caller: str | None, call: Call) -> bool:
    return any(_rule(rule, item, caller, call) for rule in item.spec.rules)


def _rule(rule: Rule, item: AuthorizationPolicy, caller: str | None, call: Call) -> bool:
    if rule.when:
        raise Undecided(f"AuthorizationPolicy/{item.metadata.name} asks for {rule.when[0].key}")
    sources = [part.source for part in rule.from_]
    operations = [part.operation for part in rule.to]
    return (not sources or any(_source(source, item, caller) for source in sources)) and (
        not operations or any(_operation(operation, item, call) for operation in operations)
    )


def _source(source: Source, item: AuthorizationPolicy, caller: str | None) -> bool:
    known = {"principals", "not_principals", "namespaces", "not_namespaces"}
    _only(source, known, item)
    principal = (caller or "").removeprefix("spiffe://")
    parts = principal.split("/")
    namespace = parts[2] if len(parts) == 5 else ""
    return _chosen(source.principals, source.not_principals, principal) and _chosen(
        source.namespaces, source.not_namespaces, namespace
    )


def _operation(operation: Operation, item: AuthorizationPolicy, call: Call) -> bool:
    _only(operation, {"methods", "not_methods", "paths", "not_paths"}, item)
    return _chosen(operation.methods, operation.not_methods, call.verb) and _chosen(
        operation.paths, operation.not_paths, call.path
    )


def _only(part: Source | Operation, known: set[str], item: AuthorizationPolicy) -> None:
    for name in type(part).model_fields:
        if getattr(part, name) and name not in known:
            raise Undecided(f"AuthorizationPolicy/{item.metadata.name} asks for {name}")


def _chosen(wanted: Sequence[str], unwanted: Iterable[str], value: str) -> bool:
    if wanted and not any(_fits(pattern, value) for pattern in wanted):
        return False
    return not any(_fits(pattern, value) for pattern in unwanted)


def _fits(pattern: str, value: str) -> bool:
    if "{" in pattern:
        return _fits_template(pattern.split("/"), value.split("/"))
    if pattern == "*":
        return bool(value)
    if pattern.startswith("*"):
        return value.endswith(pattern[1:])
    return value.startswith(pattern[:-1]) if pattern.endswith("*") else value == pattern


def _fits_template(pattern: Sequence[str], segments: Sequence[str]) -> bool:
    for number, part in enumerate(pattern):
        if part == "{**}":
            rest = pattern[number + 1 :]
            return not rest or (len(segments) >= len(rest) + number and list(segments[-len(rest) :]) == list(rest))
        if number >= len(segments) or (part != "{*}" and part != segments[number]) or (not segments[number] and number):
            return False
    return len(pattern) == len(segments)
