"""Shows a stream while it comes: a spinner until the first event, then the writer that fits the output."""

from __future__ import annotations

from collections.abc import Iterator

from autoglm import Event, Stream
from autoglm.cli.output import Output


def show(stream: Stream, output: Output, choices: int) -> Iterator[Event]:
    """Writes every event and passes it on. A failure ends the line and goes on."""
    writer = output.answer(choices)
    try:
        with output.waiting("thinking"):
            first = next(stream)
        writer.event(first)
        yield first
        for event in stream:
            writer.event(event)
            yield event
    except (Exception, KeyboardInterrupt):
        writer.broken()
        raise
