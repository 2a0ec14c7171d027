"""The page pool: nobody's page is given away, nothing is lost, what is reported is what is there."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.runtime.pages import PagePool


def test_a_named_page_is_found_until_room_is_needed() -> None:
    """Kept pages serve the next request; when free pages run out the least recently used goes first."""
    pool = PagePool(3)
    pages = [pool.take() for _ in range(3)]
    assert None not in pages and pool.take() is None
    for page, name in zip(pages, (b"a", b"b", b"c"), strict=True):
        assert pool.name(page or 0, name) == page
    pool.release([page or 0 for page in pages])
    assert (pool.used, pool.kept, pool.available) == (0, 3, 3)
    assert pool.share(b"a") == pages[0] and pool.held([b"a", b"b", b"x", b"c"]) == 2
    assert pool.take() == pages[2], "the end of a chain goes before its beginning"
    assert pool.share(b"c") is None and pool.share(b"b") == pages[1]


def test_two_pages_with_one_content_become_one() -> None:
    """Requests that computed the same block at the same time share the first page from then on."""
    pool = PagePool(2)
    one, two = pool.take(), pool.take()
    assert one is not None and two is not None
    assert pool.name(one, b"n") == one and pool.name(two, b"n") == one
    assert pool.references(one) == 2 and pool.used == 1
    pool.release([one])
    assert pool.available == 1 and pool.in_use([b"n"]) == 1
    pool.release([one])
    assert pool.available == 2 and pool.in_use([b"n"]) == 0


@given(st.lists(st.tuples(st.sampled_from("tsnr"), st.integers(0, 11)), max_size=120))
def test_pages_are_counted_right_whatever_happens(operations: list[tuple[str, int]]) -> None:
    """Against a plain model: references, free pages and reported names always add up."""
    pool, held, reported = PagePool(5), list[int](), set[bytes]()
    for number, (what, value) in enumerate(operations):
        name = bytes([value])
        if what == "t" and (page := pool.take()) is not None:
            assert page not in held, "a page in use was given away"
            held.append(page)
        elif what == "s" and (page := pool.share(name)) is not None:
            held.append(page)
        elif what == "n" and held:
            page = held[value % len(held)]
            if pool.references(page) == 1 and not any(pool.page_of(bytes([n])) == page for n in range(12)):
                held[value % len(held)] = pool.name(page, name)
        elif what == "r" and held:
            pool.release([held.pop(value % len(held))])
        assert all(pool.references(page) == held.count(page) for page in range(5))
        assert pool.used == len(set(held)) and pool.used + pool.available == 5
        if number % 3 == 0:
            added, removed = pool.changes(1000)
            reported = (reported | set(added)) - set(removed)
    added, removed = pool.changes(1000)
    assert (reported | set(added)) - set(removed) == {
        bytes([n]) for n in range(12) if pool.page_of(bytes([n])) is not None
    }
