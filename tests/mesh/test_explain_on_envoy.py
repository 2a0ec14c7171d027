"""`explain` and a real Envoy, asked the same: for many requests both must name the same route, cluster and answer."""

import asyncio
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from services.mesh.explain import Explanation, Request, explain
from services.mesh.issuer import AUDIENCE, ISSUER, JWKS_URI, Issuer
from services.mesh.keys import Keys
from services.mesh.policy import Policy, load
from services.mesh.registry import Registry, Service, ServicePort
from services.mesh.translate import translate
from tests.fakes.envoy_process import EnvoyProcess, node_settings

ROOT = Path(__file__).resolve().parents[2]
GRPC, REST = ServicePort("grpc", 50051, "grpc"), ServicePort("http", 8000, "http")
SEGMENTS = (
    "v1",
    "v0",
    "v2",
    "chat",
    "a",
    "B",
    "b",
    "x",
    "health",
    "old",
    "here",
    "..",
    ".",
    "%2e%2e",
    "robots.txt",
    "",
)
PACKAGES = ("gateway", "tokenizer", "sparse_inference", "cache", "scheduler")
METHODS = ("GetModelInfo", "GetLoad", "Score", "Generate", "Say")
HEADERS = {
    "x-a": ("1", "2"),
    "x-b": ("p", "pq", "q"),
    "x-c": ("abc", "ABC", ""),
    "x-d": ("", "any"),
    "x-e": ("2", "3"),
    "x-f": ("x",),
    "x-conversation-id": ("7", ""),
    "x-autoglm-tenant": ("t",),
    "x-data-region": ("aws", "gcp", "mars"),
}
HOSTS = (
    *("sparse-inference", "sparse-inference.autoglm", "SPARSE-inference.autoglm.svc", "sparse-inference:50051"),
    *("cache", "cache.autoglm.svc.cluster.local:50051", "tokenizer", "gateway", "gateway:8000", "gateway:50051"),
    *(
        "models.example",
        "a.models.example",
        "a.b.models.example:80",
        "models.other.example",
        "nobody",
        "models.example.org",
    ),
)
GOOD = {"iss": ISSUER, "sub": "alice", "aud": AUDIENCE, "tenant": "acme"}
CLAIMS: tuple[dict[str, Any] | None, ...] = (
    GOOD,
    GOOD | {"region": "gcp"},
    GOOD | {"aud": ["x", AUDIENCE], "region": "mars"},
    None,
    GOOD | {"aud": "x"},
    GOOD | {"iss": "somebody"},
    {"iss": ISSUER, "sub": "alice", "aud": AUDIENCE},
    GOOD,
)
REQUESTS = 240


def registry() -> Registry:
    """The base services without any endpoint: Envoy chooses a cluster and then answers by itself."""
    others = ("tokenizer", "scheduler", "cache", "sparse-inference")
    return Registry(
        (
            Service("gateway", "autoglm", (GRPC, REST), {}, {"app": "gateway"}),
            *(Service(name, "autoglm", (GRPC,), {}, {"app": name}) for name in others),
        )
    )


def some_requests(seed: int) -> list[Request]:
    """Requests that often match something: paths, hosts and headers out of the policies' own words."""
    dice = random.Random(seed)
    found = []
    for number in range(REQUESTS):
        if dice.random() < 0.4:
            package = dice.choice(PACKAGES)
            service = package.title().replace("_", "")
            path = f"/autoglm.{package}.v1.{service}Service/{dice.choice(METHODS)}"
        else:
            path = "/" + "/".join(dice.choice(SEGMENTS) for _ in range(dice.randint(1, 3)))
        query = [f"n={number}"] + [text for text in ("q=3", "q=4", "r", "r=1") if dice.random() < 0.4]
        chosen = {name: dice.choice(values) for name, values in HEADERS.items() if dice.random() < 0.4}
        found.append(
            Request(
                f"{path}?{'&'.join(query)}",
                dice.choice(HOSTS),
                dice.choice(("outside", "gateway")),
                dice.choice(("GET", "POST")),
                chosen,
            )
        )
    # One that meets all conditions of the sample's pickiest route, and its twin that fails one.
    picky = {"x-a": "1", "x-b": "p", "x-c": "abc", "x-d": "", "x-e": "3"}
    found.append(Request("/A/b?n=all&q=3&r", "sparse-inference", "gateway", "POST", picky))
    found.append(Request("/A/b?n=but&q=3&r", "sparse-inference", "gateway", "POST", picky | {"x-f": "1"}))
    return found


async def send(port: int, request: Request) -> int:
    """The status of one request, sent byte by byte as it is: no client library tidies the path up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    lines = [f"{request.method} {request.path} HTTP/1.1", f"host: {request.authority}", "content-length: 0"]
    lines += [f"{name}: {value}" for name, value in request.headers.items()]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    status = int((await reader.readuntil(b"\r\n\r\n")).split()[1])
    writer.close()  # Envoy itself would wait a second before it closed
    return status


def agrees(entry: dict[str, object], status: int, story: Explanation) -> bool:
    """Whether the line that Envoy logged is the story that was told."""
    if story.action == "nothing":
        return status == 404 and entry["cluster"] in (None, "")
    if story.action == "answer":
        return f"{status}, by Envoy itself" in {fact.value for fact in story.facts}
    if story.action == "redirect":
        return status in (301, 302, 303, 307, 308)
    return entry["cluster"] in {target.cluster for target in story.targets}


@pytest.mark.parametrize("folder", ["istio/base", "istio/clouds/aws", "tests/unit/mesh_policy/everything"])
async def test_explain_names_what_envoy_chooses(tmp_path: Path, folder: str) -> None:
    """Same listener, same cluster (one of the weighted ones), same answers of Envoy's own, for every request."""
    policy: Policy = load(ROOT / folder)
    if folder.endswith("everything"):  # its faults would answer before a cluster is chosen, its logs leave lines out
        policy = replace(_without_faults(policy), telemetries=())
    issuer = Issuer.open(tmp_path / "issuer")
    policy = await Keys({JWKS_URI: lambda: issuer.jwks}).filled(policy)
    node = node_settings(tmp_path)
    snapshot = translate(policy, registry(), node)
    requests = some_requests(seed=len(folder))
    if "clouds" in folder:
        requests = [with_token(request, number, issuer) for number, request in enumerate(requests)]
    async with EnvoyProcess(snapshot, node):
        statuses = [
            await send(node.ingress_port if request.caller == "outside" else node.outbound_port, request)
            for request in requests
        ]
    # Envoy writes its log out when it ends.
    entries = [json.loads(line) for line in (tmp_path / "access.log").read_text().splitlines()]
    by_number = {
        str(entry["path"]).partition("n=")[2].partition("&")[0]: entry for entry in entries if "n=" in entry["path"]
    }
    stories = [explain(snapshot, policy, registry(), request) for request in requests]
    wrong = []
    for request, status, story in zip(requests, statuses, stories, strict=True):
        entry = by_number[request.path.partition("n=")[2].partition("&")[0]]
        assert entry["listener"] == story.listener
        is_refused = str(entry["details"]).startswith(("jwt_authn", "rbac"))
        if story.door is not None and (is_refused != (story.door.verdict == "denied")):
            wrong.append(f"{request}: Envoy {status}, explain {story.door}")
        elif not is_refused and not agrees(entry, status, story):
            told = [target.cluster for target in story.targets] or story.action
            wrong.append(f"{request}: Envoy {status} {entry['cluster']}, explain {told} ({story.route})")
    assert wrong == []
    verdicts = {story.door.verdict for story in stories if story.door is not None}
    assert "allowed" in verdicts and ("denied" in verdicts) == ("clouds" in folder)
    kinds = {story.action for story in stories}
    assert kinds >= {"forward", "nothing"}, "the requests must be worth comparing"
    assert len({target.cluster for story in stories for target in story.targets}) >= 6


def with_token(request: Request, number: int, issuer: Issuer) -> Request:
    """The same request with one of several tokens, or none, where it comes from outside."""
    claims = CLAIMS[number % len(CLAIMS)]
    if request.caller != "outside" or claims is None:
        return request
    signed = issuer.sign({"exp": 4_000_000_000, **claims})
    return replace(request, claims=claims, headers={**request.headers, "authorization": f"Bearer {signed}"})


def _without_faults(policy: Policy) -> Policy:
    changed = []
    for service in policy.virtual_services:
        data = service.model_dump(mode="json", by_alias=True, exclude_unset=True)
        for route in data["spec"]["http"]:
            route.pop("fault", None)
        changed.append(type(service).model_validate_json(json.dumps(data)))
    return replace(policy, virtual_services=tuple(changed))
