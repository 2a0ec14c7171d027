"""Stop strings: the answer ends before the first one that is completed, however the text was cut into chunks."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from services.gateway.events import TokenText
from services.gateway.stops import StopScanner, Transcript

LETTERS = st.text("ab\nß💡", max_size=40)
STOPS = st.lists(st.text("ab\nß💡", min_size=1, max_size=5), max_size=4)


def naive(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Reads character by character; the first moment any stop string is complete ends the text before it."""
    for end in range(1, len(text) + 1):
        met = [stop for stop in stops if text[:end].endswith(stop)]
        if met:
            longest = max(met, key=len)
            return text[: end - len(longest)], longest
    return text, None


def cut(text: str, places: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[a:b] for a, b in pairwise(edges)]


@given(LETTERS, STOPS, st.lists(st.integers(0, 100), max_size=10))
def test_the_text_ends_at_the_earliest_stop_whatever_the_chunks(text: str, stops: list[str], places: list[int]) -> None:
    """What is shown is the text cut at the earliest completed stop string, for every way of chunking it."""
    scanner = StopScanner(stops)
    shown = "".join(scanner.feed(part) for part in cut(text, places)) + scanner.flush()
    assert (shown, scanner.matched) == naive(text, stops)


@given(LETTERS, STOPS, st.lists(st.integers(0, 100), max_size=10))
def test_nothing_shown_is_ever_taken_back(text: str, stops: list[str], places: list[int]) -> None:
    """After every chunk, what has been shown so far is a prefix of the final answer."""
    final, _ = naive(text, stops)
    scanner = StopScanner(stops)
    shown = ""
    for part in cut(text, places):
        shown += scanner.feed(part)
        assert final.startswith(shown)


@given(LETTERS, STOPS, st.lists(st.integers(0, 100), max_size=10))
def test_no_more_is_held_back_than_could_become_a_stop(text: str, stops: list[str], places: list[int]) -> None:
    """Text is delayed only while it is the beginning of some stop string."""
    scanner = StopScanner(stops)
    read = shown = ""
    for part in cut(text, places):
        shown += scanner.feed(part)
        read += part
        if scanner.matched is not None:
            break
        held = read[len(shown) :]
        assert not held or any(stop.startswith(held) for stop in stops)


def test_of_stops_that_end_together_the_longest_counts() -> None:
    """Nothing of a longer stop string is shown because a shorter one ends at the same character."""
    scanner = StopScanner(["c", "abc"])
    assert scanner.feed("xabcd") == "x"
    assert scanner.matched == "abc"
    assert scanner.feed("more") == "" and scanner.flush() == ""


def test_without_stops_nothing_is_held_back() -> None:
    """Text without stop strings goes straight through."""
    scanner = StopScanner([])
    assert scanner.feed("abc") == "abc"
    assert scanner.flush() == ""


def token(number: int) -> TokenText:
    return TokenText(number, bytes([number]))


def test_tokens_come_with_their_text() -> None:
    """A token is given out once all its text is, with its place in the text; one that begins in the stop never is."""
    transcript = Transcript(["END"])
    assert transcript.add("ab", [token(1)]) == ("ab", (TokenText(1, b"\1", offset=0),))
    assert transcript.add("cE", [token(2)]) == ("c", ())
    assert transcript.add("N", [token(3)]) == ("", ())
    text, tokens = transcript.add("D!", [token(4)])
    assert text == "" and transcript.matched == "END"
    assert [(one.token_id, one.offset) for one in tokens] == [(2, 2)]
    assert transcript.end() == ("", ())


def test_held_tokens_come_at_the_end() -> None:
    """What looked like the beginning of a stop string is given out when the text ends without it."""
    transcript = Transcript(["END"])
    transcript.add("E", [token(1)])
    transcript.add("N", [token(2)])
    text, tokens = transcript.end()
    assert text == "EN" and [one.token_id for one in tokens] == [1, 2]
