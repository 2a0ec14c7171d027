"""The comparison with peers counts honestly: ratios within blocks, and what is missing is missed."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from benchmarks.peers import interleave, summary
from benchmarks.peers.child import Child, Failed
from benchmarks.peers.contestants import contestants
from benchmarks.peers.interleave import Block, Entrant, Work
from benchmarks.peers.shapes import SHAPES


def blocks(*pairs: tuple[float, float]) -> list[Block]:
    return [Block("w", 0.0, {"ours int8": a, "llama.cpp Q8_0": b}, wall_gb_per_s=10.0) for a, b in pairs]


def test_a_ratio_is_taken_within_each_block() -> None:
    """A machine that slows down for a while slows both arms: the ratio does not move."""
    found = summary.ratio(blocks((20, 10), (2, 1), (200, 100)), "ours int8", "llama.cpp Q8_0")
    assert found is not None
    assert (found.median, found.low, found.high, found.blocks) == (2, 2, 2, 3)


def test_blocks_without_one_of_the_two_do_not_count() -> None:
    """A contestant that failed in the middle keeps its earlier blocks only."""
    some = [*blocks((3, 1)), Block("w", 0.0, {"ours int8": 100.0})]
    found = summary.ratio(some, "ours int8", "llama.cpp Q8_0")
    assert found is not None and found.blocks == 1
    assert summary.ratio([Block("w", 0.0, {"ours int8": 1.0})], "ours int8", "llama.cpp Q8_0") is None


def test_a_bar_without_our_figure_is_missed_and_says_so() -> None:
    """No figure is never a pass."""
    only_peer = {"decode batch 1": [Block("w", 0.0, {"llama.cpp Q8_0": 5.0}, 10.0)], "prefill 512": []}
    found = summary.bars("q05", only_peer, contestants(SHAPES["q05"]), {"llama.cpp Q8_0": 10**9})
    assert found and not any(bar.is_met for bar in found)
    assert {bar.value for bar in found} == {"not measured"}


def test_work_that_was_not_asked_for_has_no_bar() -> None:
    """A run of one kind of work says nothing about the others."""
    found = summary.bars("g15", {"prefill 2048": []}, contestants(SHAPES["g15"]), {})
    assert [bar.name for bar in found] == ["g15 prefill 2048: ours / best peer (none)"]


def test_the_share_of_the_wall_uses_the_wall_of_the_same_block() -> None:
    """1 GB read per step at 5 steps/s beside a wall of 10 GB/s is half of it, and batches read weights once a step."""
    shares = summary.wall_shares(blocks((5, 40)), 1, {"ours int8": 10**9})
    assert shares == {"ours int8": (5.0, 0.5)}
    assert summary.wall_shares(blocks((40, 1)), 8, {"ours int8": 10**9}) == {"ours int8": (5.0, 0.5)}


def test_stolen_time_is_the_share_of_the_eighth_column() -> None:
    """Guest columns after it are parts of others already and are not counted twice."""
    before, after = [0] * 10, [60, 0, 20, 10, 0, 0, 0, 10, 60, 0]
    assert interleave._steal_share(before, after) == pytest.approx(0.1)
    assert interleave._steal_share([], []) == 0.0


def test_shapes_have_the_sizes_they_claim() -> None:
    """Parameters of the published models, within a per cent (norms and biases are left out)."""
    assert SHAPES["q05"].parameters == pytest.approx(494e6, rel=0.01)
    assert SHAPES["g15"].parameters == pytest.approx(1.47e9, rel=0.01)


@pytest.fixture
def ours(tmp_path: Path):
    child = Child(Path(sys.executable), "ours", tmp_path / "log", limit_s=30)
    yield child
    child.close()


def test_a_process_that_cannot_measure_says_why(ours: Child) -> None:
    """An unknown request is an error of that request; the process goes on answering."""
    with pytest.raises(Failed, match="no such op"):
        ours.ask(op="dance")
    assert ours.ask(op="memory")["peak_rss_bytes"] > 0


def test_a_contestant_that_dies_leaves_and_the_others_go_on(ours: Child, tmp_path: Path) -> None:
    """The failure is kept for the result; no block is lost for it."""
    dead = Child(Path(sys.executable), "ours", tmp_path / "dead", limit_s=30)
    os.kill(dead.pid, signal.SIGKILL)
    failures: dict[str, str] = {}
    entrants = [Entrant("dead", dead, {}), Entrant("broken", ours, {})]
    work = Work("prefill 8", "prefill", tokens=8)
    good, bad = interleave.measure(entrants, work, 2, 0, 1.0, lambda: 1.0, failures)
    assert set(failures) == {"dead, prefill 8", "broken, prefill 8"}
    assert len(good) == 1 and good[0].figures == {} and bad == []
    dead.close()


def test_a_process_that_does_not_answer_in_time_is_given_up(tmp_path: Path) -> None:
    """A hung peer costs its limit, not the run."""
    child = Child(Path(sys.executable), "ours", tmp_path / "log", limit_s=0.0)
    try:
        with pytest.raises(Failed, match="no answer within"):
            child.ask(op="memory")
    finally:
        child.close()
