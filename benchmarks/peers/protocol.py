"""What the parent and a measured process say to each other: one JSON object per line, an answer per request.

`serve` is the child's whole main loop. Requests: {"op": "load", "model": path, "threads": n}, {"op": "decode",
"prompt": tokens, "new": steps, "batch": sequences}, {"op": "prefill", "tokens": n}, {"op": "memory"}; the first three
may carry "options", an object that only this peer understands. Standard library only: it also runs in the peers' own
environments.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from typing import Any, Protocol, TextIO

PR_SET_PDEATHSIG = 1


class Peer(Protocol):
    """An engine under measurement. One model per process; every call blocks; times are wall clock seconds."""

    def load(self, model: str, threads: int, options: dict[str, Any]) -> dict[str, Any]:
        """Loads and warms up; returns facts worth recording (version, instruction sets, bytes read per token)."""

    def decode(self, prompt: int, new: int, batch: int, options: dict[str, Any]) -> list[float]:
        """Seconds of each of `new` greedy steps of `batch` sequences that have `prompt` tokens already."""

    def prefill(self, tokens: int, options: dict[str, Any]) -> float:
        """Seconds from an empty cache to the logits after `tokens` tokens."""


def serve(peer: Peer) -> None:
    """Answers requests from standard input until it ends. What a library prints goes to standard error instead."""
    _die_with_parent()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = _do(peer, request)
        except Exception as error:  # the parent reports it and goes on with other peers
            answer = {"error": f"{type(error).__name__}: {error}"[:2000]}
        _say(answers, answer)


def _die_with_parent() -> None:
    """A frozen process does not notice that its parent is gone; Linux kills it then, elsewhere it stays."""
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    except (AttributeError, OSError):
        pass


def _do(peer: Peer, request: dict[str, Any]) -> dict[str, Any]:
    op, options = request["op"], request.get("options", {})
    if op == "load":
        return {"facts": peer.load(request["model"], request["threads"], options)}
    if op == "decode":
        return {"step_s": peer.decode(request["prompt"], request["new"], request["batch"], options)}
    if op == "prefill":
        return {"took_s": peer.prefill(request["tokens"], options)}
    if op == "memory":
        return {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    raise ValueError(f"no such op: {op!r}")


def _say(answers: TextIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()
