"""Three clouds on one machine: one token stream, requests that stay where they must, and a cloud that vanishes.

Real processes behind real Envoys in network namespaces, started once for the module. Without root they are skipped; the
smoke run (`make clouds-smoke`) then still works on loopback addresses.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import autoglm
import httpx
import pytest

from benchmarks.clouds import Clouds, running_clouds
from benchmarks.harness import MODEL
from services.mesh.clouds import asking, network, shared_artifacts, shared_cache, smoke
from services.mesh.clouds.asking import Answer, NoAnswer

CANNOT = "network namespaces need root, ip and nsenter: clouds are NOT tested here"
pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(not network.is_possible(), reason=CANNOT),
]
LOST, REGION = "azure", "eastus"
GATEWAYS = "outbound_.50051_._.gateway"
BUDGET = 7_654_321
ENDS_WITHIN_S = 20.0
"""Generous: a silent peer is given up after about three seconds on a machine that has time."""


@pytest.fixture(scope="module")
def clouds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clouds]:
    """Three clouds with one worker each, and a store of blocks between them where a server for it is installed.

    One tenant has a budget, which its answers tell: so a test sees whom a gateway took a caller for.
    """
    shares = shared_cache.find("127.0.0.1", 1) is not None
    budgets = tmp_path_factory.mktemp("budgets") / "budgets.toml"
    budgets.write_text(f"version = 1\n[tenants.acme]\ntokens_per_minute = {BUDGET}\n")
    with running_clouds(
        AUTOGLM_FEDERATION_RAMP_S="1",
        AUTOGLM_CLOUDS_SHARED_CACHE=str(shares),
        AUTOGLM_TOKEN_BUDGETS=str(budgets),
    ) as made:
        yield made


def ask(clouds: Clouds, door: str, region: str = "", max_tokens: int = 16) -> Answer:
    """One answer through a cloud's door."""
    return asking.ask(clouds.ingress(door), MODEL, clouds.token(), region, max_tokens=max_tokens)


def answers(clouds: Clouds, door: str, region: str) -> bool:
    """Whether there is an answer."""
    try:
        return bool(ask(clouds, door, region).token_ids)
    except NoAnswer:
        return False


def test_every_cloud_gives_the_same_tokens(clouds: Clouds) -> None:
    """One prompt and one seed, pinned to each cloud, through each door: equal token ids, equal variant."""
    names = [cloud.name for cloud in clouds.state.clouds]
    answers = [ask(clouds, door, region) for door in names for region in names]
    assert len(answers[0].token_ids) == 16
    assert {(answer.token_ids, answer.variant_digest) for answer in answers} == {
        (answers[0].token_ids, answers[0].variant_digest)
    }


def completion(clouds: Clouds, door: str, headers: dict[str, str]) -> httpx.Response:
    """One short answer over REST."""
    body = {"model": MODEL, "prompt": "import os\n", "max_tokens": 2}
    return httpx.post(f"http://{clouds.ingress(door)}/v1/completions", json=body, headers=headers, timeout=60)


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def test_every_door_asks_for_a_token_and_takes_the_others(clouds: Clouds, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one nobody is let in, over REST or gRPC; the issuer that all clouds share is good at each of them."""
    monkeypatch.delenv("AUTOGLM_TOKEN", raising=False)
    token = clouds.token("acme")
    for cloud in clouds.state.clouds:
        without = completion(clouds, cloud.name, {})
        assert (without.status_code, without.json()["error"]["code"]) == (401, "missing_token")
        assert completion(clouds, cloud.name, bearer("x.y.z")).status_code == 401
        assert completion(clouds, cloud.name, bearer(token)).status_code == 200
        with pytest.raises(NoAnswer, match="AccessDeniedError"):
            asking.ask(clouds.ingress(cloud.name), MODEL, None)


@pytest.mark.parametrize("region", ["aws", "gcp", "azure"])
def test_a_gateway_hears_the_tenant_of_the_token_across_clouds(clouds: Clouds, region: str) -> None:
    """Whether it is here or behind another cloud's east-west gateway; whom a caller names himself is nobody."""
    pinned = {"x-data-region": region}
    mine = completion(clouds, "aws", bearer(clouds.token("acme")) | pinned)
    assert mine.status_code == 200, mine.text
    assert mine.headers["x-ratelimit-limit-tokens"] == str(BUDGET)
    forged = completion(clouds, "aws", bearer(clouds.token("mallory")) | pinned | {"x-autoglm-tenant": "acme"})
    assert forged.status_code == 200, forged.text
    assert "x-ratelimit-limit-tokens" not in forged.headers


def test_the_region_in_a_token_is_the_word_that_counts(clouds: Clouds) -> None:
    """It wins over the caller's header, cannot be forged, and one that does not exist is refused."""
    began = time.time()
    answer = completion(clouds, "aws", bearer(clouds.token("acme", "gcp")) | {"x-data-region": "aws"})
    assert answer.status_code == 200, answer.text
    forged = {"x-autoglm-region": "aws"}
    assert completion(clouds, "aws", bearer(clouds.token("acme", "gcp")) | forged).status_code == 200
    nowhere = completion(clouds, "aws", bearer(clouds.token("acme", "mars")) | {"x-data-region": "aws"})
    assert (nowhere.status_code, nowhere.json()["error"]["code"]) == (400, "unknown_region")
    clouds.until(
        lambda: len([at for at in clouds.served("gcp", "gateway~inbound", "/v1/completions") if at >= began]) == 2,
        "both went to gcp",
    )


def test_a_model_pushed_in_one_cloud_is_fetched_in_another(clouds: Clouds, tmp_path: Path) -> None:
    """By one digest and through the store between the caches; a cloud that has fetched it needs the store no more."""
    said = smoke.models_by_digest(clouds.state)
    assert "pushed into aws, fetched from azure" in said
    digest = shared_artifacts.push(clouds.state, clouds.cloud("gcp"), Path(clouds.mesh("aws").model_dir))
    store = clouds.directory.root / shared_artifacts.FOLDER
    away = store.rename(tmp_path / "away")
    try:
        assert shared_artifacts.pull(clouds.state, clouds.cloud("azure"), digest, tmp_path / "pulled") > 0
    finally:
        away.rename(store)


def test_a_prefix_computed_in_one_cloud_is_found_in_another(clouds: Clouds) -> None:
    """Blocks are named by digest: what aws has prefilled, gcp need not."""
    if shared_cache.find("127.0.0.1", 1) is None:
        pytest.skip("neither valkey-server nor redis-server is installed (make packages): sharing is NOT tested")

    def cached(name: str, prompt: str) -> int:
        with autoglm.Client(clouds.ingress(name), model=MODEL, token=clouds.token(), timeout=60) as client:
            metadata = {"x-data-region": name}
            return client.generate(prompt, max_tokens=2, seed=1, metadata=metadata).usage.cached_tokens

    numbers = itertools.count()

    def is_found() -> bool:
        prompt = f"# prefix {next(numbers)} that both clouds are asked for\n" * 20  # new: gcp has nothing of its own
        return cached("aws", prompt) == 0 and cached("gcp", prompt) > 0

    clouds.until(is_found, "gcp finds what aws has stored")


def test_a_region_that_does_not_exist_is_refused(clouds: Clouds) -> None:
    """A misspelt region must not be served anywhere."""
    with pytest.raises(NoAnswer, match="InvalidRequestError"):
        ask(clouds, "aws", "eastus2")


def test_another_cloud_stands_in_for_a_dead_worker_and_pinned_requests_fail(clouds: Clouds) -> None:
    """The gateway stays, its worker is gone: others' workers answer, and what must stay there fails."""
    said = smoke.stand_in_and_residency(clouds.state)
    assert "served by another cloud" in said
    clouds.until(lambda: answers(clouds, "aws", LOST), "the worker is back and known", 60.0)


def test_a_cloud_that_vanishes_without_a_word(clouds: Clouds) -> None:
    """What it was answering ends in a typed error, new requests go elsewhere, pinned ones fail, and it comes back."""
    begun = threading.Event()

    def long_answer() -> Answer:
        return asking.ask(clouds.ingress("aws"), MODEL, clouds.token(), LOST, max_tokens=1800, on_text=begun.set)

    with ThreadPoolExecutor(1) as pool:
        under_way: Future[Answer] = pool.submit(long_answer)
        clouds.until(lambda: begun.is_set() or under_way.done(), "the answer has begun", 60.0)
        assert not under_way.done(), under_way.exception()
        try:
            clouds.pull(LOST)
            began = time.monotonic()
            with pytest.raises(NoAnswer, match=r"InterruptedStreamError|UnavailableError"):
                under_way.result(60.0)
            assert time.monotonic() - began < ENDS_WITHIN_S
            for name in ("aws", "gcp"):
                clouds.until(lambda name=name: REGION not in clouds.places(name, GATEWAYS), f"{name} misses it")
                assert ask(clouds, name).token_ids
                with pytest.raises(NoAnswer, match="UnavailableError"):
                    ask(clouds, name, LOST)
                with pytest.raises(NoAnswer, match="UnavailableError"):  # and what its token pins there
                    asking.ask(clouds.ingress(name), MODEL, clouds.token(region=LOST), name)
        finally:
            clouds.plug(LOST)
    for name in ("aws", "gcp"):
        clouds.until(lambda name=name: REGION in clouds.places(name, GATEWAYS), f"{name} sees it again", 60.0)
    clouds.until(lambda: answers(clouds, "aws", LOST), "it answers again", 60.0)
    assert ask(clouds, "aws", LOST).token_ids == ask(clouds, "aws", "aws").token_ids


def test_an_edit_of_one_clouds_overlay_applies_there_only(clouds: Clouds) -> None:
    """Its canary dial moves its own weights; the policy of the others keeps its version."""
    before = {name: clouds.mesh(name).policy.version for name in ("aws", "gcp")}
    clouds.edit(
        f"clouds/{LOST}/canary.yaml",
        lambda text: text.replace("value: 100}", "value: 95}").replace("weight, value: 0}", "weight, value: 5}"),
    )
    clouds.until(lambda: {item.weight for item in clouds.mesh(LOST).policy.weights} == {95, 5}, "the new weights")
    assert {name: clouds.mesh(name).policy.version for name in before} == before


def test_a_killed_run_leaves_a_network_that_the_next_one_removes(tmp_path: Path) -> None:
    """Names come from the run directory: building again replaces what is left, and removing leaves nothing."""
    net = network.network(tmp_path)
    network.build(net, ("one", "two"))
    network.build(net, ("one", "two"))
    assert (network.NETNS / net.namespace("one")).exists()
    network.remove(net)
    assert not list(network.NETNS.glob(f"autoglm-{net.key}-*"))
    assert not (Path("/sys/class/net") / net.bridge).exists()
