"""Stop strings: finds the first one that is completed, across any chunk borders, and never lets its text out.

Generation is over the moment a stop string is complete; of several that complete at the same character the longest
counts, so nothing of it is shown. The result depends on the text alone, never on how it was cut into chunks.
`Transcript` keeps tokens beside the text they belong to. Pure; knows no network.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from services.gateway.events import TokenText


class StopScanner:
    """Feeds on text, gives back what may be shown. Costs one step per character and stop string (KMP)."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._borders = [_borders(stop) for stop in self._stops]
        self._lengths = [0] * len(self._stops)  # how much of each stop string the text now ends with
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """The text that is now certain to be no part of a stop string; after a match, nothing."""
        if self.matched is not None:
            return ""
        if not self._stops:
            return text
        for position, character in enumerate(text):
            best = -1
            for index, stop in enumerate(self._stops):
                length = self._lengths[index]
                while length and stop[length] != character:
                    length = self._borders[index][length - 1]
                if stop[length] == character:
                    length += 1
                if length == len(stop) and (best < 0 or length > len(self._stops[best])):
                    best = index
                self._lengths[index] = length
            if best >= 0:
                self.matched = self._stops[best]
                shown = self._held + text[: position + 1]
                self._held = ""
                return shown[: len(shown) - len(self.matched)]
        pending = self._held + text
        keep = max(self._lengths)
        self._held = pending[len(pending) - keep :]
        return pending[: len(pending) - keep]

    def flush(self) -> str:
        """What was held back in case it became a stop string. Call at the end of the text."""
        held, self._held = self._held, ""
        return held


class Transcript:
    """The text of one choice as it may be shown, and beside it the tokens that made it.

    A token is given out when all text before its end has been; tokens that begin inside a stop string never are.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._scanner = StopScanner(stops)
        self._read = self._shown = 0
        self._waiting: deque[tuple[int, TokenText]] = deque()

    @property
    def matched(self) -> str | None:
        """The stop string that ended the text, if one did."""
        return self._scanner.matched

    def add(self, text: str, tokens: Sequence[TokenText]) -> tuple[str, tuple[TokenText, ...]]:
        """Takes the text that `tokens` added; returns what may be shown."""
        start, self._read = self._read, self._read + len(text)
        self._waiting.extend((self._read, replace(token, offset=start)) for token in tokens)
        return self._show(self._scanner.feed(text))

    def end(self) -> tuple[str, tuple[TokenText, ...]]:
        """What was still held back; nothing after a stop string."""
        return self._show(self._scanner.flush())

    def _show(self, text: str) -> tuple[str, tuple[TokenText, ...]]:
        self._shown += len(text)
        out: list[TokenText] = []
        while self._waiting:
            end, token = self._waiting[0]
            if end > self._shown and not (self.matched is not None and token.offset < self._shown):
                break
            out.append(self._waiting.popleft()[1])
        return text, tuple(out)


def _borders(word: str) -> list[int]:
    """For each prefix of `word`, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(word)
    length = 0
    for index in range(1, len(word)):
        while length and word[index] != word[length]:
            length = borders[length - 1]
        if word[index] == word[length]:
            length += 1
        borders[index] = length
    return borders
