"""Access policy: what is refused, what is doubted, and what Envoy is told, pinned to the semantics of Istio 1.30.3."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from services.mesh.keys import RETRY_S, Keys, Unreachable
from services.mesh.policy import Policy, PolicyError, check, load
from services.mesh.registry import Registry, Service, ServicePort, Workload
from services.mesh.translate.access import access_filters, peer_mode
from services.mesh.translate.tokens import keys_of_nobody

WORKER = Workload("w-0", "autoglm", "worker", {"app": "worker", "version": "v1"})
KEYS = '{"keys": [{"kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]}'
URL = "https://issuer.example/keys"


def document(kind: str, spec: str, name: str = "one", namespace: str = "autoglm", annotations: str = "{}") -> str:
    meta = f"{{name: {name}, namespace: {namespace}, annotations: {annotations}}}"
    return f"---\napiVersion: security.istio.io/v1\nkind: {kind}\nmetadata: {meta}\nspec: {spec}\n"


def loaded(tmp_path: Path, *documents: str) -> Policy:
    (tmp_path / "access.yaml").write_text("".join(documents))
    return load(tmp_path)


def peer(mode: str, labels: str = "", **more: str) -> str:
    selector = f"selector: {{matchLabels: {labels}}}, " if labels else ""
    return document("PeerAuthentication", f"{{{selector}mtls: {{mode: {mode}}}}}", **more)


@pytest.mark.parametrize(
    ("documents", "mode"),
    [
        ([], "PERMISSIVE"),
        ([peer("STRICT", namespace="istio-system")], "STRICT"),
        ([peer("STRICT", namespace="other")], "PERMISSIVE"),
        ([peer("STRICT", namespace="istio-system"), peer("DISABLE")], "DISABLE"),
        ([peer("DISABLE"), peer("STRICT", "{app: worker}", name="two")], "STRICT"),
        ([peer("DISABLE"), peer("STRICT", "{app: cache}", name="two")], "DISABLE"),
        ([peer("STRICT"), peer("UNSET", "{app: worker}", name="two")], "STRICT"),
        ([peer("STRICT", name="a"), peer("DISABLE", name="b")], "STRICT"),
        ([peer("STRICT", "{app: worker}", namespace="istio-system")], "PERMISSIVE"),
    ],
    ids=[
        "default",
        "mesh",
        "elsewhere",
        "namespace",
        "workload",
        "not its labels",
        "unset",
        "first wins",
        "root selector",
    ],
)
def test_the_narrowest_scope_decides(documents: list[str], mode: str, tmp_path: Path) -> None:
    """Workload over namespace over mesh; UNSET inherits; of two in one scope the first counts."""
    assert peer_mode(loaded(tmp_path, *documents) if documents else Policy(), WORKER, 50051) == mode


def test_a_port_can_be_an_exception(tmp_path: Path) -> None:
    """portLevelMtls speaks for its port, and UNSET there means the workload's mode."""
    spec = (
        "{selector: {matchLabels: {app: worker}}, mtls: {mode: STRICT}, "
        'portLevelMtls: {"8080": {mode: DISABLE}, "9090": {mode: UNSET}}}'
    )
    policy = loaded(tmp_path, document("PeerAuthentication", spec))
    assert [peer_mode(policy, WORKER, port) for port in (8080, 9090, 50051)] == ["DISABLE", "STRICT", "STRICT"]


DRY_RUN = '{istio.io/dry-run: "true"}'
ALLOW = "{rules: [{from: [{source: {%s}}]}]}"


@pytest.mark.parametrize(
    ("kind", "spec", "line"),
    [
        ("AuthorizationPolicy", "{action: CUSTOM}", "spec.action: action CUSTOM is not supported by the local"),
        ("AuthorizationPolicy", "{provider: {name: x}}", "spec.provider: not supported by the local control plane"),
        ("AuthorizationPolicy", "{targetRefs: []}", "spec.targetRefs: not supported by the local control plane"),
        ("AuthorizationPolicy", "{action: DENY}", "spec: a DENY policy without rules has no effect"),
        ("AuthorizationPolicy", "{rules: [{form: []}]}", "spec.rules[0].form: unknown field; did you mean from?"),
        ("AuthorizationPolicy", "{rules: [{from: []}]}", "spec.rules[0].from: "),
        ("AuthorizationPolicy", "{rules: [{from: [{source: {}}]}]}", "an empty source matches everything"),
        ("AuthorizationPolicy", "{rules: [{to: [{operation: {}}]}]}", "an empty operation matches everything"),
        ("AuthorizationPolicy", ALLOW % 'principals: ["a*b"]', "one * at the beginning or the end is a wildcard"),
        ("AuthorizationPolicy", ALLOW % 'principals: ["*a*"]', "one * at the beginning or the end is a wildcard"),
        ("AuthorizationPolicy", ALLOW % "namespaces: ['a|b']", "'a|b' is no namespace"),
        ("AuthorizationPolicy", ALLOW % "serviceAccounts: ['a(b)']", "neither name nor namespace/name"),
        ("AuthorizationPolicy", ALLOW % "serviceAccounts: [a], namespaces: [b]", "serviceAccounts cannot be combined"),
        ("AuthorizationPolicy", ALLOW % "ipBlocks: [10.0.0.0/33]", "'10.0.0.0/33' is no IP address or range"),
        ("AuthorizationPolicy", "{rules: [{to: [{operation: {ports: ['0']}}]}]}", "'0' is no port number in quotes"),
        ("AuthorizationPolicy", "{rules: [{to: [{operation: {paths: ['/a{*}']}}]}]}", "are whole segments"),
        ("AuthorizationPolicy", "{rules: [{to: [{operation: {paths: ['/{**}/{*}']}}]}]}", "must be the last operator"),
        (
            "AuthorizationPolicy",
            "{rules: [{when: [{key: source.nam, values: [a]}]}]}",
            "unknown attribute 'source.nam'",
        ),
        (
            "AuthorizationPolicy",
            "{rules: [{when: [{key: 'experimental.envoy.filters.a[b]', values: [a]}]}]}",
            "is not supported by the local control plane",
        ),
        ("AuthorizationPolicy", "{rules: [{when: [{key: source.ip}]}]}", "values or notValues is required"),
        ("AuthorizationPolicy", "{rules: [{when: [{key: source.ip, values: [here]}]}]}", "is no IP address or range"),
        ("PeerAuthentication", '{portLevelMtls: {"1": {mode: STRICT}}}', "spec: portLevelMtls needs a selector"),
        ("PeerAuthentication", "{mtls: {mode: strict}}", "spec.mtls.mode: "),
        ("RequestAuthentication", "{jwtRules: [{issuer: a}]}", "jwks or jwksUri is required"),
        (
            "RequestAuthentication",
            f"{{jwtRules: [{{issuer: a, jwksUri: '{URL}', jwks: '{KEYS}'}}]}}",
            "only one of jwks",
        ),
        ("RequestAuthentication", "{jwtRules: [{issuer: a, jwksUri: 'file:///etc/passwd'}]}", "http or https URL"),
        ("RequestAuthentication", "{jwtRules: [{issuer: a, jwks: '{}'}]}", "no key set"),
        ("RequestAuthentication", '{jwtRules: [{issuer: a, jwks: \'{"keys": [{"kty": "oct"}]}\'}]}', "secret key"),
        ("RequestAuthentication", "{jwtRules: [{issuer: a, jwks_uri: 'https://a'}]}", "jwks_uri: not supported"),
        ("RequestAuthentication", "{jwtRules: [{jwksUri: 'https://a'}]}", "spec.jwtRules[0].issuer: required"),
    ],
)
def test_what_would_mean_something_else_is_refused(kind: str, spec: str, line: str, tmp_path: Path) -> None:
    """By path, with what to do about it; and what Istio has and this control plane has not, by name."""
    with pytest.raises(PolicyError) as caught:
        loaded(tmp_path, document(kind, spec))
    assert any(line in str(problem) for problem in caught.value.problems), caught.value


def test_a_dry_run_is_yes_or_no(tmp_path: Path) -> None:
    """A word that Istio would take for false must not switch a policy on."""
    with pytest.raises(PolicyError, match="must be true or false"):
        loaded(tmp_path, document("AuthorizationPolicy", "{}", annotations='{istio.io/dry-run: "yes"}'))


def rbac(policy: Policy, port: int = 0) -> list[dict[str, Any]]:
    return [item["typed_config"] for item in access_filters(policy, WORKER, port) if "rbac" in item["name"]]


def test_without_policies_there_is_no_filter() -> None:
    """Istio's default: everybody may everything."""
    assert access_filters(Policy(), WORKER) == []


def test_an_empty_policy_allows_nothing(tmp_path: Path) -> None:
    """It has a rule that never matches, so that the filter is there."""
    (config,) = rbac(loaded(tmp_path, document("AuthorizationPolicy", "{}")))
    assert config["rules"] == {
        "action": "ALLOW",
        "policies": {
            "ns[autoglm]-policy[one]-rule[0]": {
                "permissions": [{"not_rule": {"any": True}}],
                "principals": [{"not_id": {"any": True}}],
            }
        },
    }


def test_an_empty_rule_matches_everything(tmp_path: Path) -> None:
    """`rules: [{}]` is how Istio writes: allow all."""
    (config,) = rbac(loaded(tmp_path, document("AuthorizationPolicy", "{rules: [{}]}")))
    assert config["rules"]["policies"]["ns[autoglm]-policy[one]-rule[0]"] == {
        "permissions": [{"and_rules": {"rules": [{"any": True}]}}],
        "principals": [{"and_ids": {"ids": [{"any": True}]}}],
    }


def test_one_filter_for_each_action_in_istios_order(tmp_path: Path) -> None:
    """AUDIT, DENY, ALLOW; all policies of one action together; a dry run only in the shadow rules."""
    policy = loaded(
        tmp_path,
        document("AuthorizationPolicy", "{rules: [{}]}", "allow-1"),
        document(
            "AuthorizationPolicy", "{action: DENY, rules: [{}]}", "deny", annotations='{istio.io/dry-run: "true"}'
        ),
        document("AuthorizationPolicy", "{action: AUDIT, rules: [{}]}", "audit"),
        document("AuthorizationPolicy", "{rules: [{}, {}]}", "allow-2", namespace="istio-system"),
        document("AuthorizationPolicy", "{rules: [{}]}", "elsewhere", namespace="other"),
        document("AuthorizationPolicy", "{selector: {matchLabels: {app: cache}}, rules: [{}]}", "of-the-cache"),
    )
    audit, deny, allow = rbac(policy)
    assert audit["rules"]["action"] == "LOG" and list(audit["rules"]["policies"]) == [
        "ns[autoglm]-policy[audit]-rule[0]"
    ]
    assert "rules" not in deny and deny["shadow_rules"]["action"] == "DENY"
    assert deny["shadow_rules_stat_prefix"] == "istio_dry_run_deny_"
    assert list(allow["rules"]["policies"]) == [
        "ns[autoglm]-policy[allow-1]-rule[0]",
        "ns[istio-system]-policy[allow-2]-rule[0]",
        "ns[istio-system]-policy[allow-2]-rule[1]",
    ]


def principal(name: str, value: str) -> dict[str, Any]:
    matcher = {"safe_regex": {"regex": value}} if name == "regex" else {name: value}
    return {"authenticated": {"principal_name": matcher}}


def claim(path: list[str], value: dict[str, Any]) -> dict[str, Any]:
    keys = [{"key": key} for key in ("payload", *path)]
    return {"metadata": {"filter": "envoy.filters.http.jwt_authn", "path": keys, "value": value}}


def only(tmp_path: Path, rule: str, port: int = 0) -> tuple[list[Any], list[Any]]:
    """What one rule says of the call, and of the caller."""
    (config,) = rbac(loaded(tmp_path, document("AuthorizationPolicy", f"{{rules: [{rule}]}}")), port)
    (found,) = config["rules"]["policies"].values()
    (permission,), (caller,) = found["permissions"], found["principals"]
    return permission["and_rules"]["rules"], caller["and_ids"]["ids"]


@pytest.mark.parametrize(
    ("source", "ids"),
    [
        (
            'principals: [td/ns/a/sa/b, "td/*", "*/sa/b.c", "*"]',
            [
                principal("exact", "spiffe://td/ns/a/sa/b"),
                principal("prefix", "spiffe://td/"),
                principal("regex", r"spiffe://.*/sa/b\.c"),
                principal("regex", ".+"),
            ],
        ),
        ('namespaces: [a, "b-*"]', [principal("regex", ".*/ns/a/.*"), principal("regex", ".*/ns/b-.*/.*")]),
        (
            "serviceAccounts: [x/a, b]",
            [
                principal("regex", "spiffe://.+/ns/x/(.+/|)sa/a(/.+)?"),
                principal("regex", "spiffe://.+/ns/autoglm/(.+/|)sa/b(/.+)?"),
            ],
        ),
        ("trustDomains: [td]", [principal("prefix", "spiffe://td/")]),
        (
            'ipBlocks: [10.1.2.3/8, "::1"]',
            [
                {"direct_remote_ip": {"address_prefix": "10.0.0.0", "prefix_len": 8}},
                {"direct_remote_ip": {"address_prefix": "::1", "prefix_len": 128}},
            ],
        ),
        ("remoteIpBlocks: [10.1.2.3]", [{"remote_ip": {"address_prefix": "10.1.2.3", "prefix_len": 32}}]),
    ],
)
def test_callers(source: str, ids: list[Any], tmp_path: Path) -> None:
    """Each kind of source as Istio writes it, plain and negated."""
    assert only(tmp_path, f"{{from: [{{source: {{{source}}}}}]}}")[1] == [{"or_ids": {"ids": ids}}]
    negated = "not" + source[0].upper() + source[1:]
    assert only(tmp_path, f"{{from: [{{source: {{{negated}}}}}]}}")[1] == [{"not_id": {"or_ids": {"ids": ids}}}]


@pytest.mark.parametrize(
    ("operation", "rules"),
    [
        (
            'paths: [/a, "/b/*", "*/c"]',
            [{"url_path": {"path": item}} for item in ({"exact": "/a"}, {"prefix": "/b/"}, {"suffix": "/c"})],
        ),
        (
            'paths: ["/v1/{*}/x/{**}"]',
            [
                {
                    "uri_template": {
                        "name": "uri-template",
                        "typed_config": {
                            "@type": "type.googleapis.com/"
                            "envoy.extensions.path.match.uri_template.v3.UriTemplateMatchConfig",
                            "path_template": "/v1/*/x/**",
                        },
                    }
                }
            ],
        ),
        (
            'methods: [POST, "*"]',
            [
                {"header": {"name": ":method", "string_match": {"exact": "POST"}}},
                {"header": {"name": ":method", "present_match": True}},
            ],
        ),
        (
            'hosts: ["*.a.example"]',
            [{"header": {"name": ":authority", "string_match": {"suffix": ".a.example", "ignore_case": True}}}],
        ),
        ('ports: ["80"]', [{"destination_port": 80}]),
    ],
)
def test_calls(operation: str, rules: list[Any], tmp_path: Path) -> None:
    """Each kind of operation as Istio writes it, plain and negated."""
    assert only(tmp_path, f"{{to: [{{operation: {{{operation}}}}}]}}")[0] == [{"or_rules": {"rules": rules}}]
    negated = "not" + operation[0].upper() + operation[1:]
    expected = [{"not_rule": {"or_rules": {"rules": rules}}}]
    assert only(tmp_path, f"{{to: [{{operation: {{{negated}}}}}]}}")[0] == expected


def test_ports_are_decided_by_the_number_policies_know(tmp_path: Path) -> None:
    """A local listener has another port than the workload in a cluster; what is meant is the workload's."""
    rules, _ = only(tmp_path, '{to: [{operation: {ports: ["50051", "8000"]}}]}', 50051)
    assert rules == [{"or_rules": {"rules": [{"any": True}, {"not_rule": {"any": True}}]}}]


def test_conditions_join_every_source(tmp_path: Path) -> None:
    """`when` comes after what `from` says; a claim may be one text or a list."""
    one = {"string_match": {"exact": "acme"}}
    either = {"or_match": {"value_matchers": [{"list_match": {"one_of": one}}, one]}}
    _, ids = only(
        tmp_path, "{from: [{source: {namespaces: [a]}}], when: [{key: 'request.auth.claims[x][y]', values: [acme]}]}"
    )
    assert ids == [{"or_ids": {"ids": [principal("regex", ".*/ns/a/.*")]}}, claim(["x", "y"], either)]


@pytest.mark.parametrize(
    ("value", "issuer", "subject"),
    [
        ("*", {"safe_regex": {"regex": ".+"}}, {"safe_regex": {"regex": ".+"}}),
        ("https://i.example/alice", {"exact": "https://i.example"}, {"exact": "alice"}),
        ("https://i.example/*", {"exact": "https://i.example"}, {"safe_regex": {"regex": ".+"}}),
        ("*/alice", {"safe_regex": {"regex": ".+"}}, {"exact": "alice"}),
        ("issuer*", {"prefix": "issuer"}, {"safe_regex": {"regex": ".+"}}),
    ],
)
def test_request_principals_are_issuer_and_subject(
    value: str, issuer: dict[str, Any], subject: dict[str, Any], tmp_path: Path
) -> None:
    """Split at the last slash, because an issuer is often a URL."""
    _, ids = only(tmp_path, f"{{from: [{{source: {{requestPrincipals: ['{value}']}}}}]}}")
    pair = [claim(["iss"], {"string_match": issuer}), claim(["sub"], {"string_match": subject})]
    assert ids == [{"and_ids": {"ids": pair}}]


def authentication(rules: str) -> str:
    return document("RequestAuthentication", f"{{jwtRules: [{rules}]}}")


def test_a_token_may_be_missing_but_not_wrong(tmp_path: Path) -> None:
    """One issuer: its token or none. The defaults are Istio's: the token is taken off, scope is a list."""
    policy = loaded(tmp_path, authentication(f"{{issuer: i, jwks: '{KEYS}', audiences: [a]}}"))
    (found,) = access_filters(policy, WORKER)
    config = found["typed_config"]
    either = {"requires_any": {"requirements": [{"provider_name": "origins-0"}, {"allow_missing": {}}]}}
    assert config["rules"] == [{"match": {"prefix": "/"}, "requires": either}]
    assert config["bypass_cors_preflight"] is True
    assert config["providers"]["origins-0"] == {
        "issuer": "i",
        "audiences": ["a"],
        "forward": False,
        "payload_in_metadata": "payload",
        "normalize_payload_in_metadata": {"space_delimited_claims": ["permission", "scope"]},
        "local_jwks": {"inline_string": KEYS},
    }
    (at_a_gateway,) = access_filters(policy, WORKER, chooses_routes=True)
    assert at_a_gateway["typed_config"]["providers"]["origins-0"]["clear_route_cache"] is True


def test_several_issuers_share_the_place_of_the_token(tmp_path: Path) -> None:
    """In the order of their names: any of them, or for each its token or none."""
    policy = loaded(tmp_path, authentication(f"{{issuer: b, jwks: '{KEYS}'}}, {{issuer: a, jwks: '{KEYS}'}}"))
    config = access_filters(policy, WORKER)[0]["typed_config"]
    assert {name: item["issuer"] for name, item in config["providers"].items()} == {"origins-0": "a", "origins-1": "b"}
    each = [
        {"requires_any": {"requirements": [{"provider_name": name}, {"allow_missing": {}}]}}
        for name in ("origins-0", "origins-1")
    ]
    names: list[Any] = [{"provider_name": "origins-0"}, {"provider_name": "origins-1"}]
    every = [*names, {"requires_all": {"requirements": each}}]
    assert config["rules"][0]["requires"] == {"requires_any": {"requirements": every}}


def test_keys_of_nobody_are_the_same_every_time() -> None:
    """Equal policy gives equal bytes, another URL another key."""
    assert keys_of_nobody(URL) == keys_of_nobody(URL) != keys_of_nobody(URL + "2")
    (key,) = json.loads(keys_of_nobody(URL))["keys"]
    assert "d" not in key and key["crv"] == "P-256"


REGISTRY = Registry(
    tuple(
        Service(name, "autoglm", (ServicePort("grpc", 50051, "grpc"),), {}, {"app": name})
        for name in ("worker", "cache")
    )
)


@pytest.mark.parametrize(
    ("documents", "path", "message"),
    [
        (
            [document("AuthorizationPolicy", "{selector: {matchLabels: {app: wroker}}}")],
            "spec.selector",
            "no workload of namespace autoglm has the labels app=wroker",
        ),
        (
            [document("AuthorizationPolicy", ALLOW % "principals: [cluster.local/ns/autoglm/sa/wroker]")],
            "spec.rules[0].from[0].source.principals",
            "there is no service account wroker in namespace autoglm",
        ),
        (
            [document("AuthorizationPolicy", ALLOW % "principals: ['spiffe://cluster.local/ns/autoglm/sa/worker']")],
            "spec.rules[0].from[0].source.principals",
            "is not trust-domain/ns/namespace/sa/account",
        ),
        (
            [document("AuthorizationPolicy", ALLOW % "principals: [other.example/ns/autoglm/sa/worker]")],
            "spec.rules[0].from[0].source.principals",
            "of another trust domain",
        ),
        (
            [document("AuthorizationPolicy", ALLOW % "serviceAccounts: [wroker]")],
            "spec.rules[0].from[0].source.serviceAccounts",
            "there is no service account wroker",
        ),
        (
            [document("AuthorizationPolicy", ALLOW % "requestPrincipals: ['*']")],
            "spec.rules[0].from[0].source",
            "no RequestAuthentication reads tokens for cache, worker",
        ),
        (
            [document("AuthorizationPolicy", "{rules: [{when: [{key: request.auth.audiences, values: [a]}]}]}")],
            "spec.rules[0].when[0]",
            "no RequestAuthentication reads tokens",
        ),
        (
            [document("AuthorizationPolicy", "{rules: [{to: [{operation: {paths: [autoglm.Cache/Get]}}]}]}")],
            "spec.rules[0].to[0].operation.paths",
            "does not begin with a slash",
        ),
        (
            [document("AuthorizationPolicy", "{rules: [{to: [{operation: {ports: ['5051']}}]}]}")],
            "spec.rules[0].to[0].operation.ports",
            "the workloads have no port 5051; they have 50051",
        ),
        (
            [peer("STRICT", name="a"), peer("DISABLE", name="b")],
            "spec.selector",
            "PeerAuthentication/a is for the same",
        ),
        ([peer("STRICT", "{app: cache}", namespace="istio-system")], "spec.selector", "ignored in istio-system"),
    ],
)
def test_what_cannot_do_what_was_meant_is_said(documents: list[str], path: str, message: str, tmp_path: Path) -> None:
    """One warning with its place; the policy still works."""
    (found,) = [problem for problem in check(loaded(tmp_path, *documents), REGISTRY) if message in problem.message]
    assert (found.path, found.severity) == (path, "warning")


class Provider:
    """An identity provider that answers what it is told to."""

    def __init__(self, answer: str | None = KEYS) -> None:
        self.answer, self.asked, self.now = answer, 0, 0.0

    def __call__(self, url: str, timeout_s: float) -> str:
        self.asked += 1
        if self.answer is None:
            raise Unreachable("connection refused")
        return self.answer

    def clock(self) -> float:
        return self.now


def keys_in(policy: Policy) -> str | None:
    return policy.request_authentications[0].spec.jwt_rules[0].jwks


def test_keys_are_fetched_once_and_put_into_the_policy(tmp_path: Path) -> None:
    """The second reading of the same policy asks nobody."""
    policy, provider = loaded(tmp_path, authentication(f"{{issuer: i, jwksUri: '{URL}'}}")), Provider()
    keys = Keys(fetch=provider, clock=provider.clock)
    assert keys_in(asyncio.run(keys.filled(policy))) == KEYS
    assert keys_in(asyncio.run(keys.filled(policy))) == KEYS
    assert provider.asked == 1 and keys.warnings() == []


@pytest.mark.parametrize("answer", [None, "<html>", "{}", "x" * 100_000])
def test_an_issuer_without_keys_is_named_and_tried_again(answer: str | None, tmp_path: Path) -> None:
    """Until it answers nobody gets in; then the keys are there without an edit."""
    policy, provider = loaded(tmp_path, authentication(f"{{issuer: i, jwksUri: '{URL}'}}")), Provider(answer)
    keys = Keys(fetch=provider, clock=provider.clock)
    empty = asyncio.run(keys.filled(policy))
    assert keys_in(empty) is None
    assert access_filters(empty, WORKER)[0]["typed_config"]["providers"]["origins-0"]["local_jwks"] == {
        "inline_string": keys_of_nobody(URL)
    }
    assert URL in keys.warnings()[0] and "every token of the issuer is refused" in keys.warnings()[0]
    provider.answer = KEYS
    assert not asyncio.run(keys.renew()) and provider.asked == 1  # not at once
    provider.now = RETRY_S
    assert asyncio.run(keys.renew())
    assert keys_in(asyncio.run(keys.filled(policy))) == KEYS and keys.warnings() == []


def test_a_provider_that_goes_away_keeps_its_keys(tmp_path: Path) -> None:
    """Old keys stay in use, and the warning says so."""
    policy, provider = loaded(tmp_path, authentication(f"{{issuer: i, jwksUri: '{URL}'}}")), Provider()
    keys = Keys(fetch=provider, clock=provider.clock)
    asyncio.run(keys.filled(policy))
    provider.answer, provider.now = None, 1e6
    assert asyncio.run(keys.renew())
    assert keys_in(asyncio.run(keys.filled(policy))) == KEYS
    assert "the keys fetched before stay in use" in keys.warnings()[0]


def test_a_local_issuer_needs_no_network(tmp_path: Path) -> None:
    """Its keys are taken from where they are; what Envoy knows by inline keys stays as it is written."""
    rules = f"{{issuer: i, jwksUri: '{URL}'}}, {{issuer: j, jwks: '{KEYS}'}}"
    policy, provider = loaded(tmp_path, authentication(rules)), Provider(None)
    filled = asyncio.run(Keys({URL: lambda: KEYS}, provider).filled(policy))
    assert [rule.jwks for rule in filled.request_authentications[0].spec.jwt_rules] == [KEYS, KEYS]
    assert provider.asked == 0 and replace(filled, request_authentications=()) == replace(
        policy, request_authentications=()
    )
