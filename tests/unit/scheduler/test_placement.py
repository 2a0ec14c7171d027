"""`placement.choose`: it rejects by the rules, ranks by the policy, and is a pure function."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.placement import FILTERS, NO_REPLICA, Candidate, Request, choose
from services.scheduler.policy import SCORERS, BadPolicy, Policy, policy_from

names = st.sampled_from(["", "a", "b"])
small = st.integers(0, 6)
labels = st.dictionaries(st.sampled_from(["version", "zone"]), st.sampled_from(["v1", "v2"]), max_size=2).map(
    lambda found: tuple(sorted(found.items()))
)
requests = st.builds(
    Request,
    prompt_tokens=st.integers(0, 3000),
    max_tokens=st.integers(0, 3000),
    model=names,
    variant_digest=names,
    subset_labels=labels,
    subset_hint=st.none() | st.lists(st.sampled_from(["h:0", "h:1", "h:2"]), max_size=3).map(tuple),
)
candidates = st.lists(
    st.builds(
        Candidate,
        replica_id=st.just("set below"),
        endpoint=st.just("set below"),
        model=names,
        variant_digest=names,
        labels=labels,
        draining=st.booleans(),
        max_running=st.integers(1, 4),
        max_waiting=st.integers(0, 4),
        running=small,
        waiting=small,
        in_flight=small,
        in_flight_at_report=small,
        pending_prefill_tokens=st.integers(0, 10_000),
        kv_used_bytes=st.integers(0, 1000),
        kv_capacity_bytes=st.integers(0, 1000),
        kv_bytes_per_token=small,
        context_tokens=st.sampled_from([0, 1024, 4096]),
        block_tokens=st.integers(1, 16),
        matched_blocks=st.integers(0, 300),
        reported_ns=st.integers(0, 10**10),
    ),
    max_size=6,
).map(lambda found: [replace(entry, replica_id=f"r{i}", endpoint=f"h:{i}") for i, entry in enumerate(found)])
keys = st.integers(0, 2**63 - 1)


def worker(name: str, **facts: object) -> Candidate:
    plain = Candidate(name, f"{name}:1", "m", "v", max_running=4, max_waiting=4, context_tokens=4096, reported_ns=1)
    return replace(plain, **facts)  # type: ignore[arg-type]


@given(requests, candidates, keys)
def test_a_rejected_replica_is_never_picked(request: Request, replicas: list[Candidate], key: int) -> None:
    """Endpoints hold exactly scored replicas: none that drains, is full, or fails what the request demands."""
    decision = choose(request, replicas, Policy(max_endpoints=16), 10**10, key)
    chosen = set(decision.replica_ids)
    for replica, verdict in zip(replicas, decision.verdicts, strict=True):
        assert verdict.replica_id == replica.replica_id
        assert (replica.replica_id in chosen) == (verdict.rejection == "")
        if replica.replica_id in chosen:
            assert not replica.draining
            assert replica.occupancy < replica.max_running + replica.max_waiting
            assert request.model in ("", replica.model) and request.variant_digest in ("", replica.variant_digest)
            assert set(request.subset_labels) <= set(replica.labels)
            assert request.subset_hint is None or replica.endpoint in request.subset_hint
            assert all(0 <= score <= 1 for score in verdict.scores) and 0 <= verdict.total <= 1
    assert bool(decision.refusal) == (not chosen)
    assert decision.refusal in ("", NO_REPLICA, *FILTERS)


@given(requests, candidates, keys)
def test_equal_inputs_give_equal_decisions(request: Request, replicas: list[Candidate], key: int) -> None:
    """Purity, to the last bit: scores and all."""
    first = choose(request, replicas, Policy(), 10**10, key)
    assert choose(request, list(replicas), Policy(), 10**10, key) == first


@given(requests, candidates, keys)
def test_the_order_of_the_table_decides_nothing(request: Request, replicas: list[Candidate], key: int) -> None:
    """Two schedulers that learnt of the workers in another order agree."""
    forward = choose(request, replicas, Policy(), 10**10, key)
    assert choose(request, replicas[::-1], Policy(), 10**10, key).endpoints == forward.endpoints


def test_ties_spread_over_all_replicas() -> None:
    """Equal workers share the load: the key decides, and each of three wins about a third."""
    replicas = [worker(name) for name in "abc"]
    firsts = [choose(Request(), replicas, Policy(), 2, key).replica_ids[0] for key in range(300)]
    assert all(70 <= firsts.count(name) <= 130 for name in "abc")


def test_the_fallbacks_are_ordered_and_bounded() -> None:
    """Best first, at most max_endpoints."""
    replicas = [worker(f"r{number}", running=number) for number in range(4)]
    decision = choose(Request(), replicas, Policy(max_endpoints=3), 2, 0)
    assert decision.replica_ids == ("r0", "r1", "r2")


def test_a_held_prefix_beats_a_slightly_idler_worker() -> None:
    """Prefix affinity works, and yields once its worker is full of work."""
    request = Request(prompt_tokens=160)
    holder, idle = worker("holder", block_tokens=16, matched_blocks=10, running=1), worker("idle", block_tokens=16)
    assert choose(request, [holder, idle], Policy(), 2, 0).replica_ids[0] == "holder"
    busy = replace(holder, running=4, waiting=3)
    assert choose(request, [busy, idle], Policy(), 2, 0).replica_ids[0] == "idle"


def test_a_report_is_not_counted_twice() -> None:
    """Requests that were there when the report came are in it; only what happened since corrects it."""
    assert worker("w", running=3, in_flight=3, in_flight_at_report=3).occupancy == 3
    assert worker("w", running=3, in_flight=5, in_flight_at_report=3).occupancy == 5
    assert worker("w", running=3, in_flight=1, in_flight_at_report=3).occupancy == 1
    assert worker("w", running=0, in_flight=2, in_flight_at_report=2).occupancy == 2


@pytest.mark.parametrize(
    ("facts", "request_facts", "reason"),
    [
        ({"draining": True}, {}, "draining"),
        ({"running": 8}, {}, "saturated"),
        ({}, {"model": "other"}, "model"),
        ({}, {"variant_digest": "other"}, "variant"),
        ({}, {"prompt_tokens": 4000, "max_tokens": 97}, "context"),
        ({}, {"subset_labels": (("version", "v2"),)}, "subset"),
        ({}, {"subset_hint": ()}, "hint"),
    ],
)
def test_the_refusal_names_the_reason(facts: dict[str, object], request_facts: dict[str, object], reason: str) -> None:
    """One unsuitable worker: its rejection is the refusal."""
    decision = choose(Request(**request_facts), [worker("w", **facts)], Policy(), 2, 0)  # type: ignore[arg-type]
    assert (decision.refusal, decision.endpoints) == (reason, ())


def test_the_refusal_is_that_of_the_replica_that_came_furthest() -> None:
    """A full worker of the right variant says "come back", whatever the wrong ones say."""
    replicas = [worker("other", variant_digest="x"), worker("full", running=8)]
    assert choose(Request(variant_digest="v"), replicas, Policy(), 2, 0).refusal == "saturated"
    assert choose(Request(), [], Policy(), 2, 0).refusal == NO_REPLICA


def test_an_old_report_counts_less() -> None:
    """Equal workers, one silent for twice the allowed age: the one that still reports wins for every key."""
    policy = Policy(stale_after_ns=1000)
    replicas = [worker("silent", reported_ns=1), worker("speaking", reported_ns=2500)]
    assert {choose(Request(), replicas, policy, 3000, key).replica_ids[0] for key in range(50)} == {"speaking"}


@pytest.mark.parametrize(
    "data",
    [
        [],
        {},
        {"version": ""},
        {"version": "2", "weight": {}},
        {"version": "2", "weights": {"nothing": 1}},
        {"version": "2", "weights": {"prefix": -1}},
        {"version": "2", "weights": {"prefix": True}},
        {"version": "2", "weights": {"prefix": float("nan")}},
        {"version": "2", "weights": dict.fromkeys(SCORERS, 0)},
        {"version": "2", "max_endpoints": 0},
        {"version": "2", "stale_after_ns": 1.5},
    ],
)
def test_a_bad_policy_is_refused(data: object) -> None:
    """No entry is guessed or ignored."""
    with pytest.raises(BadPolicy):
        policy_from(data)


def test_a_policy_survives_its_file_form() -> None:
    """What the log's header says is the policy that decided."""
    policy = policy_from({"version": "2", "weights": {"prefix": 3}, "max_endpoints": 2})
    assert policy_from(policy.as_json()) == policy and policy.weights[SCORERS.index("prefix")] == 3.0
