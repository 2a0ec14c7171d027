"""Writes to standard output in one of three manners: to a person, as plain lines into a pipe, as JSON lines.

Only the first uses colours, spinners and footers. Text from a model is data from a stranger: on a terminal its control
characters are shown instead of obeyed. A reader that goes away raises `ReaderGone`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table
from rich.text import Text

from autoglm import AutoglmError, Delta, Done, Event, Finish, Token, TooBusyError

# C0 without tab and newline becomes its Unicode picture, DEL and C1 a replacement character.
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
_VISIBLE |= {0x7F: 0x2421} | {code: 0xFFFD for code in range(0x80, 0xA0)}


class ReaderGone(Exception):
    """Whoever read our standard output has closed it; there is nobody to write for."""


class AnswerWriter(Protocol):
    """Shows one answer. `event` is called for each event in order; `broken` instead of the rest after a failure."""

    def event(self, event: Event) -> None: ...
    def broken(self) -> None: ...


class Output:
    """Standard output. `is_person` is true when it is a terminal and JSON was not asked for."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.is_person = sys.stdout.isatty() and not as_json
        self.console = Console(highlight=False, markup=False, soft_wrap=True)
        if not self.is_person and hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")

    def write(self, text: str) -> None:
        """Writes and flushes, so that a pipe sees tokens as they come."""
        try:
            sys.stdout.write(text.translate(_VISIBLE) if self.is_person else text)
            sys.stdout.flush()
        except BrokenPipeError as error:
            raise ReaderGone from error

    def record(self, fields: Mapping[str, Any]) -> None:
        """One JSON line."""
        self.write(json.dumps(fields, ensure_ascii=False) + "\n")

    def note(self, text: str) -> None:
        """A dim remark for a person; nothing in a pipe."""
        if self.is_person:
            self.console.print(Text(text, style="dim"))

    def waiting(self, text: str) -> AbstractContextManager[Any]:
        """A spinner for a person."""
        return self.console.status(text) if self.is_person else nullcontext()

    def rows(self, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A table: drawn for a person, tab-separated without a heading in a pipe, one object per row in JSON."""
        if self.as_json:
            for row in rows:
                self.record(dict(zip(columns, row, strict=True)))
        elif self.is_person:
            table = Table(*columns, header_style="bold")
            for row in rows:
                table.add_row(*(Text(_shown(cell).translate(_VISIBLE)) for cell in row))
            self.console.print(table)
        else:
            self.write("".join("\t".join(_shown(cell) for cell in row) + "\n" for row in rows))

    def failure(self, error: AutoglmError) -> None:
        """The error: a line on standard error, and in JSON also the last object of the output."""
        wait = error.retry_after_s if isinstance(error, TooBusyError) else None
        if self.as_json:
            self.record(
                {
                    "event": "error",
                    "error": type(error).__name__,
                    "message": error.message,
                    "code": error.code,
                    "reason": error.reason,
                    "request_id": error.request_id,
                    "trace_id": error.trace_id,
                    "retry_after_s": wait,
                }
            )
        is_told = wait is not None and f" {wait:g} s" in error.message
        tail = f"; try again in {wait:g} s" if wait is not None and not is_told else ""
        tail += f" [request {error.request_id}]" if error.request_id else ""
        line = f"autoglm: {error.message}{tail}".translate(_VISIBLE)
        Console(stderr=True, markup=False, highlight=False, soft_wrap=True).print(Text(line, style="red"))

    def answer(self, choices: int) -> AnswerWriter:
        """The writer for one answer with this many choices."""
        if self.as_json:
            return _JsonAnswer(self)
        return _TextAnswer(self) if choices <= 1 else _SeveralAnswers(self)


class _JsonAnswer:
    def __init__(self, output: Output) -> None:
        self._output = output

    def event(self, event: Event) -> None:
        match event:
            case Delta(text=text, choice=choice, tokens=tokens):
                fields: dict[str, Any] = {"event": "delta", "choice": choice, "text": text}
                if tokens:
                    fields["tokens"] = [_token(token) for token in tokens]
            case Finish(reason=reason, choice=choice, stop=stop):
                fields = {"event": "finish", "choice": choice, "reason": reason, "stop": stop}
            case Done(usage=usage, request_id=request_id, trace_id=trace_id, variant_digest=digest):
                counts = {
                    "prompt_tokens": usage.prompt_tokens,
                    "cached_tokens": usage.cached_tokens,
                    "completion_tokens": usage.completion_tokens,
                }
                ids = {"request_id": request_id, "trace_id": trace_id, "variant_digest": digest}
                fields = {"event": "done", "usage": counts, **ids}
        self._output.record(fields)

    def broken(self) -> None:
        pass


class _TextAnswer:
    """One choice, written as it comes; for a person with a footer of speed and counts."""

    def __init__(self, output: Output) -> None:
        self._output, self._last, self._reason = output, "", "stop"
        self._started = time.monotonic()
        self._first_s: float | None = None

    def event(self, event: Event) -> None:
        match event:
            case Delta(text=text) if text:
                self._first_s = self._first_s or time.monotonic() - self._started
                self._last = text  # first, so that Ctrl-C between the two lines still finds what was written
                self._output.write(text)
            case Finish(reason=reason):
                self._reason = reason
            case Done(usage=usage):
                self.broken()
                self._output.note(self._footer(usage.completion_tokens))
            case _:
                pass

    def broken(self) -> None:
        if self._last and not self._last.endswith("\n"):
            self._output.write("\n")

    def _footer(self, tokens: int) -> str:
        total_s = time.monotonic() - self._started
        first_s = self._first_s or total_s
        parts = [f"{tokens} tokens"]
        if tokens > 1 and total_s > first_s:
            parts.append(f"{(tokens - 1) / (total_s - first_s):.1f} tokens/s")
        return " · ".join([*parts, f"first after {first_s:.2f} s", self._reason])


class _SeveralAnswers:
    """Several choices arrive interleaved; each is written when it is complete, under its number."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._texts: dict[int, str] = {}

    def event(self, event: Event) -> None:
        match event:
            case Delta(text=text, choice=choice):
                self._texts[choice] = self._texts.get(choice, "") + text
            case Finish(choice=choice):
                self._show(choice)
            case Done(usage=usage):
                self._output.note(f"{usage.completion_tokens} tokens")

    def broken(self) -> None:
        for choice in sorted(self._texts):
            self._show(choice)

    def _show(self, choice: int) -> None:
        text = self._texts.pop(choice, "")
        self._output.write(f"[{choice}] {text}" + ("" if text.endswith("\n") else "\n"))


def _token(token: Token) -> dict[str, Any]:
    top = [{"id": other.token_id, "bytes": list(other.content), "logprob": other.logprob} for other in token.top]
    text = token.content.decode(errors="replace")
    return {"id": token.token_id, "text": text, "bytes": list(token.content), "logprob": token.logprob, "top": top}


def _shown(cell: object) -> str:
    return "" if cell is None else str(cell)
