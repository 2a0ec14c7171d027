"""Every bar that was measured, on one page: benchmarks/results/README.md, made from the result files beside it.

    python -m benchmarks.overview

A test keeps the page current. What the missed ones mean, and where bytes and cycles go, is in docs/performance.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
PAGE = RESULTS / "README.md"


def parts(results: Path = RESULTS) -> Iterator[tuple[str, dict[str, Any]]]:
    """File and content of each measurement; a file may hold several."""
    for path in sorted(results.glob("*.json")):
        content = json.loads(path.read_text())
        for part in content["parts"].values() if "parts" in content else [content]:
            yield path.name, part


def page(results: Path = RESULTS) -> str:
    """The page, in Markdown."""
    found = list(parts(results))
    bars = [bar for _, part in found for bar in part["bars"]]
    missed = sum(not bar["is_met"] for bar in bars)
    lines = [
        "# What was measured",
        "",
        f"{len(bars)} bars, {missed} missed. Made by `python -m benchmarks.overview` from the files here; each names",
        "its command, commit and machine. What the missed ones mean: [docs/performance.md](../../docs/performance.md).",
    ]
    for name, part in found:
        day = datetime.fromtimestamp(part["unix_s"], UTC).date()
        lines += ["", f"## {_words(part['command'])}", ""]
        lines += [f"[{name}]({name}), {day}, {part['machine']['processor']}, {part['machine']['cores']} cores.", ""]
        if not part["bars"]:
            lines += ["No bar; figures in the file."]
            continue
        lines += ["| bar | value | target | |", "| --- | --- | --- | --- |"]
        lines += [
            f"| {bar['name']} | {bar['value']} | {bar['target']} | {'ok' if bar['is_met'] else '**missed**'} |"
            for bar in part["bars"]
        ]
    return "\n".join(lines) + "\n"


def _words(command: str) -> str:
    return f"`{command.replace('python -m benchmarks.', '')}`"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}")
