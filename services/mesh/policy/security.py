"""Who may call what: PeerAuthentication, AuthorizationPolicy and RequestAuthentication of security.istio.io/v1."""

import re
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from services.mesh.policy.base import (
    ISTIO_VERSION,
    MAX_LIST,
    Document,
    HeaderName,
    Labels,
    PositiveDuration,
    Strict,
)
from services.mesh.policy.security_values import (
    Accounts,
    Name,
    Namespaces,
    Networks,
    Paths,
    Patterns,
    Ports,
    PortText,
    PublicKeys,
    Text,
    Url,
    account,
    namespace,
    network,
    port,
)
from services.mesh.registry import Workload

ROOT_NAMESPACE = "istio-system"
"""Objects here concern the whole mesh."""
DRY_RUN = "istio.io/dry-run"

_BOOLEANS = {
    **dict.fromkeys(("1", "t", "T", "TRUE", "true", "True"), True),
    **dict.fromkeys(("0", "f", "F", "FALSE", "false", "False"), False),
}
_WHEN = re.compile(
    r"source\.(ip|namespace|serviceAccount|principal)|remote\.ip|destination\.(ip|port)|connection\.sni"
    r"|request\.auth\.(principal|audiences|presenter)|request\.auth\.claims(\[[^\[\]]{1,128}\]){1,8}"
    r"|request\.headers\[[A-Za-z0-9!#$%&'*+.^_`|~-]{1,128}\]"
)
_NOT_HERE = re.compile(r"experimental\.envoy\.filters\..*|source\.trustDomain|target\..*|connection\..*")
_ADDRESSES = {"source.ip", "remote.ip", "destination.ip"}


def _known_action(value: object) -> object:
    if value == "CUSTOM":
        text = f"CUSTOM is not supported by the local control plane (Istio {ISTIO_VERSION} has it)"
        raise PydanticCustomError("action", text)
    return value


class Selector(Strict):
    """Workloads by their labels, all of which must be there."""

    match_labels: Labels = Field(default_factory=dict)


class _Selecting(Strict):
    istio_has: ClassVar[frozenset[str]] = frozenset({"targetRef", "targetRefs"})

    selector: Selector = Selector()


# --- PeerAuthentication


class Mtls(Strict):
    mode: Literal["UNSET", "DISABLE", "PERMISSIVE", "STRICT"] = "UNSET"


class PeerAuthenticationSpec(Strict):
    selector: Selector = Selector()
    mtls: Mtls = Mtls()
    port_level_mtls: dict[PortText, Mtls] = Field(default_factory=dict, max_length=MAX_LIST)

    @model_validator(mode="after")
    def _ports_need_a_selector(self) -> Self:
        if self.port_level_mtls and not self.selector.match_labels:
            raise PydanticCustomError("ports", "portLevelMtls needs a selector")
        return self


class PeerAuthentication(Document):
    """Whether callers must show a certificate."""

    api_version: Literal["security.istio.io/v1"]
    kind: Literal["PeerAuthentication"]
    spec: PeerAuthenticationSpec


# --- AuthorizationPolicy


class Source(Strict):
    """Who calls: every list given must have a match, and no `not` list may."""

    principals: Patterns = ()
    not_principals: Patterns = ()
    request_principals: Patterns = ()
    not_request_principals: Patterns = ()
    namespaces: Namespaces = ()
    not_namespaces: Namespaces = ()
    service_accounts: Accounts = ()
    not_service_accounts: Accounts = ()
    trust_domains: Patterns = ()
    not_trust_domains: Patterns = ()
    ip_blocks: Networks = ()
    not_ip_blocks: Networks = ()
    remote_ip_blocks: Networks = ()
    not_remote_ip_blocks: Networks = ()

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        _refuse_empty(self, "source")
        named = self.principals + self.not_principals + self.namespaces + self.not_namespaces
        if (self.service_accounts or self.not_service_accounts) and named:
            raise PydanticCustomError("source", "serviceAccounts cannot be combined with namespaces or principals")
        return self


class Operation(Strict):
    """What is called."""

    hosts: Patterns = ()
    not_hosts: Patterns = ()
    ports: Ports = ()
    not_ports: Ports = ()
    methods: Patterns = ()
    not_methods: Patterns = ()
    paths: Paths = ()
    not_paths: Paths = ()

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        _refuse_empty(self, "operation")
        return self


def _refuse_empty(item: Strict, name: str) -> None:
    if not any(getattr(item, field) for field in type(item).model_fields):
        raise PydanticCustomError(
            "empty", "an empty {name} matches everything: leave it out if that is meant", {"name": name}
        )


class From(Strict):
    source: Source


class To(Strict):
    operation: Operation


class Condition(Strict):
    """A further attribute of the call, by Istio's name for it."""

    key: Text
    values: Patterns = ()
    not_values: Patterns = ()

    @model_validator(mode="after")
    def _is_known(self) -> Self:
        if not _WHEN.fullmatch(self.key):
            if _NOT_HERE.fullmatch(self.key):
                text = f"{{key}} is not supported by the local control plane (Istio {ISTIO_VERSION} has it)"
                raise PydanticCustomError("when", text, {"key": self.key[:80]})
            raise PydanticCustomError("when", "unknown attribute '{key}'", {"key": self.key[:80]})
        if not self.values and not self.not_values:
            raise PydanticCustomError("when", "values or notValues is required")
        for value in (*self.values, *self.not_values):
            if self.key in _ADDRESSES:
                network(value)
            elif self.key == "destination.port":
                port(value)
            elif self.key == "source.serviceAccount":
                account(value)
            elif self.key == "source.namespace":
                namespace(value)
        return self


class Rule(Strict):
    """Matches where one of `from`, one of `to` and every `when` match; a part left out matches everything."""

    from_: tuple[From, ...] = Field(default=(), alias="from", min_length=1, max_length=512)
    to: tuple[To, ...] = Field(default=(), min_length=1, max_length=512)
    when: tuple[Condition, ...] = Field(default=(), max_length=MAX_LIST)


class AuthorizationPolicySpec(_Selecting):
    istio_has: ClassVar[frozenset[str]] = _Selecting.istio_has | {"provider"}

    action: Annotated[Literal["ALLOW", "DENY", "AUDIT"], BeforeValidator(_known_action)] = "ALLOW"
    rules: tuple[Rule, ...] = Field(default=(), max_length=512)

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if self.action != "ALLOW" and not self.rules:
            raise PydanticCustomError("rules", "a {action} policy without rules has no effect", {"action": self.action})
        return self


class AuthorizationPolicy(Document):
    """Rules that allow, deny or audit. An ALLOW policy without rules allows nothing, and thereby denies the rest."""

    api_version: Literal["security.istio.io/v1"]
    kind: Literal["AuthorizationPolicy"]
    spec: AuthorizationPolicySpec

    @model_validator(mode="after")
    def _dry_run_is_a_boolean(self) -> Self:
        if self.metadata.annotations.get(DRY_RUN, "false") not in _BOOLEANS:
            raise PydanticCustomError("dry-run", "annotation istio.io/dry-run must be true or false")
        return self

    @property
    def is_dry_run(self) -> bool:
        """Counted and logged, not enforced."""
        return _BOOLEANS[self.metadata.annotations.get(DRY_RUN, "false")]


# --- RequestAuthentication


class FromHeader(Strict):
    name: HeaderName
    prefix: Annotated[str, StringConstraints(max_length=128)] = ""


class ClaimToHeader(Strict):
    header: HeaderName
    claim: Name


class JwtRule(Strict):
    """An issuer whose tokens are taken. A wrong token is refused; that there is one is AuthorizationPolicy's matter."""

    istio_has: ClassVar[frozenset[str]] = frozenset({"jwks_uri"})

    issuer: Name
    audiences: tuple[Name, ...] = Field(default=(), max_length=MAX_LIST)
    jwks: PublicKeys | None = None
    jwks_uri: Url | None = None
    from_headers: tuple[FromHeader, ...] = Field(default=(), max_length=16)
    from_params: tuple[Name, ...] = Field(default=(), max_length=16)
    from_cookies: tuple[Name, ...] = Field(default=(), max_length=16)
    output_payload_to_header: HeaderName | None = None
    output_claim_to_headers: tuple[ClaimToHeader, ...] = Field(default=(), max_length=16)
    forward_original_token: bool = False
    timeout: PositiveDuration | None = None
    space_delimited_claims: tuple[Name, ...] = Field(default=(), max_length=MAX_LIST)

    @model_validator(mode="after")
    def _one_source_of_keys(self) -> Self:
        if self.jwks is not None and self.jwks_uri is not None:
            raise PydanticCustomError("jwks", "only one of jwks and jwksUri can be set")
        if self.jwks is None and self.jwks_uri is None:
            text = f"jwks or jwksUri is required: discovery is not supported here (Istio {ISTIO_VERSION} has it)"
            raise PydanticCustomError("jwks", text)
        return self


class RequestAuthenticationSpec(_Selecting):
    jwt_rules: tuple[JwtRule, ...] = Field(default=(), max_length=16)


class RequestAuthentication(Document):
    """Whose tokens say who the user is."""

    api_version: Literal["security.istio.io/v1"]
    kind: Literal["RequestAuthentication"]
    spec: RequestAuthenticationSpec


SecurityObject = PeerAuthentication | AuthorizationPolicy | RequestAuthentication


def concerns(item: SecurityObject, workload: Workload) -> bool:
    """Whether the object is about this workload: its namespace or the root namespace, and its labels."""
    if item.metadata.namespace not in (workload.namespace, ROOT_NAMESPACE):
        return False
    return item.spec.selector.match_labels.items() <= dict(workload.labels).items()
