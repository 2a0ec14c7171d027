"""Names of prefixes, and the worker's own block store."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.prefix import block_hashes, scope_key
from engine.runtime.blocks import BlockStore


def test_a_name_depends_on_everything_before_it() -> None:
    """Equal prefixes have equal names; a change in an early block changes all later names."""
    scope = scope_key("sha256:a", "tenant", 4)
    one, two = block_hashes(scope, [1, 2, 3, 4, 5, 6, 7, 8, 9], 4), block_hashes(scope, [1, 2, 3, 4, 5, 6, 7, 0], 4)
    assert len(one) == 2 and one[0] == two[0] and one[1] != two[1]
    assert block_hashes(scope, [0, 2, 3, 4, 5, 6, 7, 8], 4)[1] != one[1]


@pytest.mark.parametrize("other", [("sha256:b", "tenant", 4), ("sha256:a", "tenant2", 4), ("sha256:a", "tenant", 8)])
def test_scopes_never_share_a_name(other: tuple[str, str, int]) -> None:
    """Another variant, tenant or block size never meets this one's blocks."""
    mine = set(block_hashes(scope_key("sha256:a", "tenant", 4), [7] * 64, 4))
    assert not mine & set(block_hashes(scope_key(*other), [7] * 64, other[2]))


@pytest.mark.parametrize("parts", [("", "t", 4), ("v", "", 4), ("v", "t", 0)])
def test_an_unknown_scope_fails_closed(parts: tuple[str, str, int]) -> None:
    """Without a full scope there is no name at all."""
    with pytest.raises(ValueError, match="known"):
        scope_key(*parts)


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 30)), max_size=80))
def test_the_store_keeps_its_bound_and_reports_its_content(operations: list[tuple[int, int]]) -> None:
    """Never more bytes than allowed; the reported changes add up to what is stored."""
    store, reported = BlockStore(100), set[bytes]()
    sizes: dict[int, int] = {}
    for number, (name, size) in enumerate(operations):
        store.put(bytes([name]), bytes(sizes.setdefault(name, size)))
        assert store.used_bytes <= 100
        if number % 3 == 0:
            added, removed = store.changes(1000)
            reported = (reported | set(added)) - set(removed)
    added, removed = store.changes(1000)
    reported = (reported | set(added)) - set(removed)
    assert reported == {bytes([name]) for name in range(21) if store.leading([bytes([name])])}


def test_leading_stops_at_the_first_gap() -> None:
    """Only an unbroken run from the start is a usable prefix."""
    store = BlockStore(100)
    for name in (b"a", b"b", b"d"):
        store.put(name, name * 3)
    assert store.leading([b"a", b"b", b"c", b"d"]) == [b"aaa", b"bbb"]
    assert store.put(b"x" * 3, bytes(101)) is False


def test_a_prompt_loses_its_end_before_its_beginning() -> None:
    """What stays of a prompt that was used is a prefix of it: a chain without its first block is of no use."""
    store = BlockStore(3)
    for name in (b"a", b"b", b"c"):
        store.put(name, name)
    assert len(store.leading([b"a", b"b", b"c"])) == 3
    store.put(b"d", b"d")
    assert store.leading([b"a", b"b", b"c"]) == [b"a", b"b"]
