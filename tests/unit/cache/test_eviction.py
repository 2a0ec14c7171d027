"""Eviction: never over the bound, the end of a prompt before its beginning, the same victims for the same calls."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from services.cache.blocks import BlockKey
from services.cache.eviction import PROTECTED_SHARE, Eviction, Ring


def key(*path: int, scope: int = 0) -> BlockKey:
    """A node of the tree of prompts: its path of choices from the root."""
    return BlockKey(bytes([scope]) * 32, bytes(path).ljust(32, b"\xff"))


def prompt(path: list[int], scope: int = 0) -> list[BlockKey]:
    return [key(*path[: end + 1], scope=scope) for end in range(len(path))]


class World:
    """Uses an Eviction as the store does, with workers that match, fetch and put whole prompts."""

    def __init__(self, capacity: int, scope_bytes: int | None = None) -> None:
        self.order = Eviction(capacity, scope_bytes or capacity)
        self.parents: dict[BlockKey, BlockKey | None] = {}
        self.log: list[BlockKey] = []

    def serve(self, chain: list[BlockKey], sizes: list[int]) -> None:
        held = 0
        while held < len(chain) and chain[held] in self.order:
            held += 1
        self.order.touch(chain[:held], promote=True)
        for index in range(held, len(chain)):
            name, parent = chain[index], chain[index - 1] if index else None
            self.parents[name] = parent
            if name not in self.order and self.order.fits(sizes[index]):
                self.evicted(self.order.add(name, sizes[index], parent))
        self.order.touch(chain[held:], promote=False)

    def evicted(self, victims: list[BlockKey]) -> None:
        self.log += victims
        gone = set(victims)
        for name in self.order:
            parent = self.parents[name]
            assert parent not in gone, "a parent left before its child"
        assert self.order.used_bytes <= self.order.capacity_bytes


paths = st.lists(st.integers(0, 2), min_size=1, max_size=6)
requests = st.lists(st.tuples(st.integers(0, 2), paths, st.integers(1, 3)), max_size=60)


@settings(max_examples=300, deadline=None)
@given(requests, st.integers(3, 30), st.integers(3, 30))
def test_bounds_hold_and_children_leave_before_parents(
    work: list[tuple[int, list[int], int]], capacity: int, scope_bytes: int
) -> None:
    """Whatever is asked for: used bytes stay within tier and share, and no block outlives the start of its prompt."""
    world, twin = World(capacity, scope_bytes), World(capacity, scope_bytes)
    for scope, path, size in work:
        for each in (world, twin):
            each.serve(prompt(path, scope), [size] * len(path))
        for which in range(3):
            held = sum(1 for name in world.order if name.scope == bytes([which]) * 32)
            assert held <= min(scope_bytes, capacity)
    assert world.log == twin.log, "the same calls gave other victims"
    assert list(world.order) == list(twin.order)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("atrpx"), paths), max_size=80))
def test_books_stay_straight_under_any_calls(calls: list[tuple[str, list[int]]]) -> None:
    """Adds, touches, promotions and removals in any order, chains that lie included: sums and orders still agree."""
    order = Eviction(12, 8)
    held: dict[BlockKey, int] = {}
    for call, path in calls:
        chain = prompt(path)
        size = len(path)
        if call == "a" and chain[-1] not in order and order.fits(size):
            held[chain[-1]] = size
            for victim in order.add(chain[-1], size, chain[0]):
                del held[victim]
        elif call == "r":
            order.remove(chain[-1])
            held.pop(chain[-1], None)
        elif call in "tp":
            order.touch(chain, promote=call == "p")
        else:
            order.touch(list(reversed(chain)), promote=True)
        assert order.used_bytes == sum(held.values()) <= 12
        assert sorted(order) == sorted(held)
        assert order._protected_bytes <= PROTECTED_SHARE * 12


def test_one_long_scan_does_not_wash_out_what_is_used_again() -> None:
    """A prompt fetched twice survives ten times the tier's size of prompts seen once."""
    world = World(100)
    hot = prompt([0, 1, 2, 3, 4])
    world.serve(hot, [1] * 5)
    world.serve(hot, [1] * 5)
    for number in range(200):
        world.serve(prompt([9, number, 1, 2, 3]), [1] * 5)
    assert all(name in world.order for name in hot)


def test_a_prompt_larger_than_the_tier_keeps_its_beginning() -> None:
    """What stays of a chain that does not fit is its first blocks."""
    world = World(10)
    chain = prompt(list(range(25)))
    world.serve(chain, [1] * 25)
    assert [name in world.order for name in chain] == [True] * 10 + [False] * 15


def test_a_full_scope_makes_room_among_its_own() -> None:
    """A tenant at its share evicts its own blocks, never another's."""
    world = World(100, scope_bytes=10)
    other = prompt([1, 2, 3], scope=1)
    world.serve(other, [1] * 3)
    for number in range(50):
        world.serve(prompt([number, 1], scope=2), [1, 1])
    assert all(name in world.order for name in other)
    assert {victim.scope for victim in world.log} == {bytes([2]) * 32}


def test_ring_matches_a_list() -> None:
    """The linked ring behaves as a plain list under random inserts and removals."""
    chooser, ring = random.Random(7), Ring()
    model: list[BlockKey] = []
    for step in range(2000):
        if model and chooser.random() < 0.4:
            name = chooser.choice(model)
            model.remove(name)
            ring.remove(name)
        else:
            name = key(step % 256, step // 256)
            before = chooser.choice([None, *model])
            ring.insert(name, before)
            model.insert(len(model) if before is None else model.index(before), name)
        assert ring.first == (model[0] if model else None)
        assert len(ring) == len(model)
    assert list(ring) == model
