"""`diff` and `explain` as functions and as commands: what an edit changes, and which YAML decides a request."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from services.mesh import inputs, state
from services.mesh.__main__ import app
from services.mesh.differences import Change, at_risk, differences
from services.mesh.explain import CannotExplain, Explanation, NoToken, Request, claims_of, explain
from services.mesh.explain.access import Ruling, judge
from services.mesh.explain.request import normalised
from services.mesh.inputs import Inputs
from services.mesh.issuer import Issuer
from services.mesh.policy import Policy, load
from services.mesh.registry import Endpoint, Registry, Service, ServicePort
from services.mesh.rundir import RunDirectory, write_atomically
from services.mesh.translate import NodeSettings, Snapshot, translate

ROOT = Path(__file__).resolve().parents[3]
BASE = ROOT / "istio" / "base"
GRPC, REST = ServicePort("grpc", 50051, "grpc"), ServicePort("rest", 8000, "http")
WORKERS = "sparse-inference.autoglm.svc.cluster.local"
GENERATE = "/autoglm.sparse_inference.v1.SparseInferenceService/Generate"


def registry() -> Registry:
    """The base services, two workers in two clouds among them."""
    workers = (
        Endpoint("127.0.0.1", 7001, {"app": "sparse-inference", "version": "v1"}, "aws/us-east-1/a"),
        Endpoint("127.0.0.1", 7002, {"app": "sparse-inference", "version": "v1"}, "gcp/us-central1/b"),
        Endpoint("127.0.0.1", 7003, {"app": "sparse-inference", "version": "canary"}, "aws/us-east-1/a"),
    )
    others = ("tokenizer", "scheduler", "cache")
    return Registry(
        (
            Service("gateway", "autoglm", (GRPC, REST), {"rest": (Endpoint("127.0.0.1", 7000),)}, {"app": "gateway"}),
            *(Service(name, "autoglm", (GRPC,), {}, {"app": name}) for name in others),
            Service("sparse-inference", "autoglm", (GRPC,), {"grpc": workers}, {"app": "sparse-inference"}),
        )
    )


def node(directory: Path = Path("/run/mesh")) -> NodeSettings:
    """A node in aws."""
    return replace(NodeSettings(directory), locality="aws/us-east-1/a")


def edited(tmp_path: Path, *changes: tuple[str, str, str]) -> Path:
    """A copy of istio/base with texts replaced: (file, old, new)."""
    folder = tmp_path / "edited"
    folder.mkdir()
    for path in BASE.glob("*.yaml"):
        text = path.read_text()
        for name, old, new in changes:
            if name == path.name:
                assert old in text
                text = text.replace(old, new, 1)
        (folder / path.name).write_text(text)
    return folder


def changes_of(tmp_path: Path, *changes: tuple[str, str, str]) -> tuple[Change, ...]:
    """What such an edit changes in Envoy."""
    before, after = (translate(load(folder), registry(), node()) for folder in (BASE, edited(tmp_path, *changes)))
    return differences(before, after)


def test_equal_policies_differ_in_nothing(tmp_path: Path) -> None:
    """Comments, file names and the order of objects are no differences."""
    assert changes_of(tmp_path, ("gateway.yaml", "# The one door.", "# Door.")) == ()


def test_a_weight_is_one_change_and_endangers_nothing(tmp_path: Path) -> None:
    """The canary's dial: both shares before and after, no listener, no cluster."""
    (change,) = changes_of(
        tmp_path, ("routes.yaml", "weight: 100", "weight: 90"), ("routes.yaml", "weight: 0", "weight: 10")
    )
    assert (change.kind, change.how, change.drains) == ("route", "changed", False)
    assert change.details == (
        f"outbound|50051|canary|{WORKERS}: 0 % → 10 %",
        f"outbound|50051|v1|{WORKERS}: 100 % → 90 %",
    )


def test_a_changed_listener_is_named_as_a_risk(tmp_path: Path) -> None:
    """Only what changes the listener itself drains it, and the filter that went is told by name."""
    found = changes_of(tmp_path, ("gateway.yaml", "protocol: GRPC-WEB", "protocol: HTTP"))
    assert at_risk(found) == ("ingress",)
    assert "grpc_web" in found[0].details[0] and "nothing" in found[0].details[0]
    assert "cut" in found[0].effect


def test_a_pool_a_route_and_a_subset_are_told_apart(tmp_path: Path) -> None:
    """Each has its own line: the cluster's field, the route that came, the clusters and endpoints that went."""
    found = changes_of(
        tmp_path,
        ("destinations.yaml", "tcp: {connectTimeout: 1s}", "tcp: {connectTimeout: 3s}"),
        (
            "routes.yaml",
            "    - name: rest\n",
            "    - name: status\n      match: [{uri: {exact: /status}}]\n"
            "      directResponse: {status: 204}\n    - name: rest\n",
        ),
        ("destinations.yaml", "    - name: conversation\n", "    - name: talk\n"),
        ("routes.yaml", "subset: conversation, port: {number: 50051}", "subset: talk, port: {number: 50051}"),
        ("routes.yaml", "subset: conversation, port: {number: 8000}", "subset: talk, port: {number: 8000}"),
    )
    said = {(change.kind, change.how, change.name): change for change in found}
    assert said["cluster", "changed", f"outbound|50051|v1|{WORKERS}"].details == ("connect_timeout: 1s → 3s",)
    assert ("route", "added", "ingress: *:80: status (/status)") in said
    host = "gateway.autoglm.svc.cluster.local"
    assert {(kind, how) for kind, how, name in said if "|conversation|" in name} == {
        ("cluster", "removed"),
        ("endpoints", "removed"),
    }
    assert ("cluster", "added", f"outbound|8000|talk|{host}") in said
    assert at_risk(found) == ()


def test_the_order_of_routes_is_a_difference(tmp_path: Path) -> None:
    """The first route that matches is taken, so a swap without any other edit matters."""
    text = yaml.safe_load_all((BASE / "routes.yaml").read_text())
    documents = [document for document in text if document is not None]
    documents[0]["spec"]["http"].reverse()
    folder = edited(tmp_path)
    (folder / "routes.yaml").write_text(yaml.safe_dump_all(documents))
    found = differences(*(translate(load(item), registry(), node()) for item in (BASE, folder)))
    assert [(change.kind, change.details) for change in found] == [("route", ("the order of the routes",))]


def test_a_snapshot_is_what_its_files_say(tmp_path: Path) -> None:
    """Read back from the run directory, nothing is lost: so `diff` compares with what Envoy has."""
    snapshot = translate(load(BASE), registry(), node(tmp_path))
    for name, content in snapshot.files().items():
        write_atomically(tmp_path / name, content.decode())
    assert differences(snapshot, Snapshot.read(tmp_path)) == ()
    assert (
        Snapshot.read(tmp_path).version
        == replace(
            snapshot,
            routes=tuple(sorted(snapshot.routes, key=lambda item: str(item["name"]))),
            endpoints=tuple(sorted(snapshot.endpoints, key=lambda item: str(item["cluster_name"]).replace("|", "_."))),
        ).version
    )


def told(path: str, caller: str = "outside", **headers: str) -> dict[str, Any]:
    """An explanation as JSON, with the facts of route and targets by name."""
    policy = load(BASE)
    authority = "localhost" if caller == "outside" else "sparse-inference"
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = Request(path, authority, caller, "POST", named)
    story = asdict(explain(translate(policy, registry(), node()), policy, registry(), request))
    return story | {"by_name": {fact["what"]: fact for fact in story["facts"]}}


def test_every_decision_names_file_object_and_place() -> None:
    """Route, pool and picker each point at the YAML that decides; what nobody wrote points at nothing."""
    story = told(GENERATE, "gateway")
    assert story["route"] == "sparse-inference"
    assert (
        story["by_name"]["route"]["source"] == "istio/base/routes.yaml: VirtualService/sparse-inference: spec.http[1]"
    )
    assert story["by_name"]["timeout"]["source"] == ""
    (target,) = story["targets"]
    facts = {fact["what"]: fact for fact in target["facts"]}
    assert facts["endpoint chosen by"]["source"] == "istio/base/inference-pool.yaml: InferencePool/sparse-inference"
    assert facts["pool"]["source"] == "istio/base/destinations.yaml: DestinationRule/sparse-inference"
    assert facts["endpoints, rank 0"]["value"] == "aws/us-east-1/a (weight 1): 127.0.0.1:7001"
    assert facts["endpoints, rank 1"]["value"] == "gcp/us-central1/b (weight 1): 127.0.0.1:7002"
    assert [fact["what"] for fact in story["passed_over"]] == ["sparse-inference-questions"] * 3
    assert "path is not" in story["passed_over"][0]["value"]


def test_the_door_forgets_what_the_outside_may_not_say() -> None:
    """Headers that the listener removes take no part, and are named."""
    story = told("/v1/models", x_autoglm_tenant="root", x_conversation_id="7")
    assert story["by_name"]["headers removed at the door"]["value"] == "x-autoglm-tenant"
    assert story["targets"][0]["cluster"] == "outbound|8000|conversation|gateway.autoglm.svc.cluster.local"
    assert story["by_name"]["sticks by"]["value"] == "header x-conversation-id"


def test_no_route_is_a_story_too() -> None:
    """404, and each route with the reason why it was not taken."""
    story = told(GENERATE)
    assert (story["action"], story["targets"]) == ("nothing", ())
    assert len(story["passed_over"]) == 8
    with pytest.raises(CannotExplain, match="nobody called worker has a listener here"):
        policy = load(BASE)
        snapshot = translate(policy, registry(), node())
        bare = replace(snapshot, listeners=tuple(i for i in snapshot.listeners if i["name"] != "outbound"))
        explain(bare, policy, registry(), Request("/x", "y", "worker"))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/a/../b", "/b"),
        ("/a/./b", "/a/b"),
        ("/../../x", "/x"),
        ("/a/%2E%2e/b?c=/../d", "/b?c=/../d"),
        ("/a//b", "/a//b"),
        ("/a/..", "/"),
        ("/a/b/.", "/a/b/"),
        ("\\a\\b".replace("\\a", "/a"), "/a/b"),
        ("http://h/a/../b?q", "/b?q"),
    ],
)
def test_paths_are_normalised_as_envoy_does(path: str, expected: str) -> None:
    """Dot segments go, in clear or escaped; the query is left alone."""
    assert normalised(path) == expected


def rbac(action: str, rules: dict[str, Any]) -> dict[str, Any]:
    """An RBAC filter."""
    return {"name": "envoy.filters.http.rbac", "typed_config": {"rules": {"action": action, "policies": rules}}}


def ruling(request: Request, *filters: dict[str, Any], files: dict[tuple[str, str, str], str] | None = None) -> Ruling:
    """The ruling of an inbound listener with these filters."""
    manager = {"http_filters": [*filters, {"name": "envoy.filters.http.router", "typed_config": {}}]}
    listener = {
        "name": "sparse-inference-0~inbound|50051||",
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": 7001}},
        "filter_chains": [{"filters": [{"typed_config": manager}]}],
    }
    snapshot = Snapshot({}, (), (listener,), (), ())
    place = [{"lb_endpoints": [{"endpoint": {"address": {"socket_address": {"address": "a", "port_value": 7001}}}}]}]
    return judge(snapshot, Policy(files=files or {}), place, request)


FROM_GATEWAY = {"authenticated": {"principal_name": {"exact": "spiffe://cluster.local/ns/autoglm/sa/gateway"}}}
TO_GENERATE = {"and_rules": {"rules": [{"or_rules": {"rules": [{"url_path": {"path": {"exact": GENERATE}}}]}}]}}
ALLOW = {"ns[autoglm]-policy[workers]-rule[0]": {"permissions": [TO_GENERATE], "principals": [FROM_GATEWAY]}}
TOKEN = {"metadata": {"filter": "envoy.filters.http.jwt_authn", "path": [{"key": "payload"}], "value": {}}}


@pytest.mark.parametrize(
    ("caller", "path", "filters", "verdict"),
    [
        ("gateway", GENERATE, [rbac("ALLOW", ALLOW)], "allowed"),
        ("cache", GENERATE, [rbac("ALLOW", ALLOW)], "denied"),
        ("outside", GENERATE, [rbac("ALLOW", ALLOW)], "denied"),
        ("gateway", GENERATE + "2", [rbac("ALLOW", ALLOW)], "denied"),
        ("gateway", GENERATE, [rbac("DENY", ALLOW), rbac("ALLOW", ALLOW)], "denied"),
        ("gateway", GENERATE, [rbac("LOG", ALLOW)], "allowed"),
        ("gateway", GENERATE, [rbac("ALLOW", {})], "denied"),
        ("gateway", GENERATE, [], "allowed"),
        (
            "gateway",
            GENERATE,
            [rbac("DENY", {"x": {"permissions": [{"any": True}], "principals": [TOKEN]}})],
            "depends",
        ),
        (
            "gateway",
            GENERATE,
            [rbac("DENY", {"x": {"permissions": [{"any": True}], "principals": [{"not_id": FROM_GATEWAY}]}})],
            "allowed",
        ),
        (
            "gateway",
            GENERATE,
            [rbac("ALLOW", {"x": {"permissions": [{"destination_port": 7001}], "principals": [{"any": True}]}})],
            "allowed",
        ),
    ],
)
def test_the_ruling_is_that_of_the_services_own_rules(
    caller: str, path: str, filters: list[dict[str, Any]], verdict: str
) -> None:
    """Deny before allow, nothing allowed means denied, and what only a token shows is said to depend."""
    assert ruling(Request(path, "sparse-inference", caller), *filters).verdict == verdict


def test_a_ruling_names_the_policy_and_its_file() -> None:
    """Which rule of which object, or which objects do not speak of the caller."""
    files = {("AuthorizationPolicy", "autoglm", "workers"): "istio/base/access.yaml"}
    found = ruling(Request(GENERATE, "w", "gateway"), rbac("ALLOW", ALLOW), files=files)
    assert found.why == "by istio/base/access.yaml: AuthorizationPolicy/workers: spec.rules[0]"
    refused = ruling(Request(GENERATE, "w", "cache"), rbac("ALLOW", ALLOW), files=files)
    assert "spiffe://cluster.local/ns/autoglm/sa/cache" in refused.why and "access.yaml" in refused.why


def at_the_door(claims: dict[str, Any] | None, path: str = "/v1/completions", **headers: str) -> Explanation:
    """The story of a request from outside under the base with tokens."""
    policy = load(BASE.parent / "clouds" / "aws")
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = Request(path, "localhost", headers=named, claims=claims)
    return explain(translate(policy, registry(), node()), policy, registry(), request)


CLAIMS = {"iss": "https://issuer.autoglm.internal", "sub": "alice", "aud": "autoglm", "tenant": "acme"}


@pytest.mark.parametrize(
    ("claims", "verdict", "why"),
    [
        (None, "denied", "tokens.yaml: AuthorizationPolicy/tokens: spec.rules[0]"),
        (CLAIMS, "allowed", "authorization.yaml: AuthorizationPolicy/ingress: spec.rules[0]"),
        (CLAIMS | {"aud": ["a", "autoglm"]}, "allowed", "AuthorizationPolicy/ingress"),
        (CLAIMS | {"aud": "a"}, "denied", "AuthorizationPolicy/tokens: spec.rules[1]"),
        (CLAIMS | {"tenant": ""}, "denied", "AuthorizationPolicy/tokens: spec.rules[2]"),
        (CLAIMS | {"iss": "somebody"}, "denied", "401: the issuer of the token is somebody"),
    ],
)
def test_the_door_is_part_of_the_story(claims: dict[str, Any] | None, verdict: str, why: str) -> None:
    """With a token and without: whether the request comes in, and which rule of which file decides."""
    ruling = at_the_door(claims).door
    assert ruling is not None and ruling.verdict == verdict and why in ruling.why


def test_a_tokens_claims_choose_the_route() -> None:
    """As headers that nobody can send: what the caller wrote there is gone."""
    assert at_the_door(CLAIMS | {"region": "gcp"}, x_data_region="aws").route == "rest-only-gcp"
    assert at_the_door(CLAIMS, x_data_region="aws", x_autoglm_region="gcp").route == "rest-only-aws"
    assert at_the_door(None, path="/health").door == Ruling(
        "allowed", "by istio/base/authorization.yaml: AuthorizationPolicy/ingress: spec.rules[0]"
    )


def test_inside_there_is_no_door() -> None:
    """A service's call is judged where it arrives."""
    policy = load(BASE)
    story = explain(translate(policy, registry(), node()), policy, registry(), Request(GENERATE, "w", "gateway"))
    assert story.door is None


@pytest.mark.parametrize("token", ["", "a.b", "a.%%%.c", "a.W10.c", f"a.{'W1tb' * 20_000}.c"])
def test_what_is_no_token_is_told(token: str) -> None:
    """Not three parts, no JSON, no object."""
    with pytest.raises(NoToken):
        claims_of(token)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Runs a command with a run directory of its own."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("AUTOGLM_RUN_DIR", str(tmp_path / "run"))

    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(app, list(arguments))

    yield invoke


def test_diff_compares_with_the_mesh_that_runs(tmp_path: Path, run: Any) -> None:
    """It takes that mesh's endpoints and ports; without a mesh it says what to do, with status 3."""
    assert run("diff").exit_code == 3
    directory = RunDirectory(tmp_path / "run")
    with directory.hold():
        here = node(directory.envoy)
        snapshot = translate(load(BASE), registry(), here)
        for name, content in snapshot.files().items():
            write_atomically(directory.envoy / name, content.decode())
        inputs.write(Inputs(here, registry(), BASE))
        assert "no difference" in run("diff").output
        folder = edited(
            tmp_path, ("gateway.yaml", "l: GRPC-WEB", "l: HTTP"), ("routes.yaml", "attempts: 1", "attempts: 3")
        )
        out = run("diff", str(folder))
        assert out.exit_code == 0 and "streams at risk on: ingress" in out.output
        found = json.loads(run("diff", str(folder), "--json").output)
        assert {change["kind"] for change in found["changes"]} == {"listener", "route"}
        (folder / "routes.yaml").write_text((folder / "routes.yaml").read_text().replace("weight: 100", "weight: 9"))
        refused = run("diff", str(folder))
        assert refused.exit_code == 1 and "would be refused, and the old policy would stay" in refused.output
    assert state.read(directory.state) is None


def test_explain_runs_without_a_mesh(run: Any) -> None:
    """For the mesh as it would be started; the exit status says whether the request gets anywhere."""
    good = run("explain", GENERATE, "--from", "gateway")
    assert good.exit_code == 0 and "VirtualService/sparse-inference: spec.http[1]" in good.output
    assert json.loads(run("explain", "/v1/models", "--json").output)["route"] == "rest"
    assert run("explain", "/nowhere").exit_code == 1
    verdicts = {}
    for path in (GENERATE, "/autoglm.sparse_inference.v1.SparseInferenceService/Nothing"):
        (target,) = json.loads(run("explain", path, "--from", "gateway", "--json").output)["targets"]
        verdicts[path] = target["access"]
    assert verdicts[GENERATE]["verdict"] == "allowed"
    assert "AuthorizationPolicy/sparse-inference: spec.rules[" in verdicts[GENERATE]["why"]
    assert verdicts["/autoglm.sparse_inference.v1.SparseInferenceService/Nothing"]["verdict"] == "denied"
    assert run("explain", "/v1/models", "--header", "nonsense").exit_code == 2
    assert run("explain", "/v1/models", "--claim", "nonsense").exit_code == 2
    assert run("explain", "/v1/models", "--token", "nonsense").exit_code == 2


def test_explain_takes_a_token_or_imagines_one(tmp_path: Path, run: Any) -> None:
    """The exit status says whether the door lets it in; a token in hand and its claims give the same answer."""
    asked = ("explain", "/v1/models", "--policy", "istio/with-tokens")
    closed = run(*asked)
    assert closed.exit_code == 1 and "door          denied: by" in closed.output
    claims = ("--claim", "tenant=acme", "--claim", "aud=x", "--claim", "aud=autoglm")
    assert run(*asked, *claims).exit_code == 0
    token = Issuer.open(tmp_path / "issuer").token("acme", "autoglm", timedelta(minutes=1), datetime.now(UTC))
    opened = json.loads(run(*asked, "--token", token, "--json").output)
    assert opened["door"]["verdict"] == "allowed" and opened["route"] == "rest"
    assert {"what": "header from the token", "value": "x-autoglm-tenant: acme", "source": ""} in opened["facts"]


def test_check_runs_without_a_mesh(run: Any) -> None:
    """Folder by folder."""
    checked = run("check", "istio/base", "istio/gateway-api", "--json")
    assert [item["ok"] for item in json.loads(checked.output)] == [True, True]


def test_check_fails_with_the_mistake_and_its_place(tmp_path: Path, run: Any) -> None:
    """Exit status 1, file, object and path."""
    folder = edited(tmp_path, ("routes.yaml", "weight: 100", "weight: 99"))
    out = run("check", str(folder))
    assert out.exit_code == 1
    assert "VirtualService/sparse-inference: spec.http[1].route: weights add up to 99" in out.output


def test_autoglm_hands_over_to_the_control_plane(tmp_path: Path) -> None:
    """`autoglm mesh …` is `python -m services.mesh …` with its exit code; away from the repository it says so."""
    command = [sys.executable, "-m", "autoglm.cli", "mesh", "explain", "/v1/models"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(ROOT / "sdk"), "AUTOGLM_RUN_DIR": str(tmp_path / "run")}
    here = subprocess.run([*command, "--json"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (here.returncode, json.loads(here.stdout)["route"]) == (0, "rest")
    bad = subprocess.run([*command, "--header", "x"], cwd=ROOT, env=environment, capture_output=True, check=False)
    assert bad.returncode == 2
    away = subprocess.run(
        [sys.executable, "-P", *command[1:]], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert away.returncode == 2 and "run this in a clone of it" in away.stderr
