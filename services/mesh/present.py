"""What `make run` shows: the mesh coming up, the first answer as it streams, its trace, and what to try next."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from services.mesh import demo, timeline
from services.mesh.state import MeshState

MARKS = {
    "waiting": ("·", "dim"),
    "starting": ("…", "yellow"),
    "ready": ("✓", "green"),
    "backing off": ("!", "red"),
    "failed": ("✗", "bold red"),
    "stopping": ("…", "yellow"),
    "stopped": ("-", "dim"),
}


class Progress:
    """A live list of components; without a terminal, one line per change."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, refresh_per_second=12, transient=False) if console.is_terminal else None
        self._said: dict[str, str] = {}

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, state: MeshState) -> None:
        """Shows the newest state."""
        if self._live is not None:
            self._live.update(_components(state))
            return
        for item in state.processes:
            if self._said.get(item.name) != item.phase:
                self._said[item.name] = item.phase
                if item.phase not in ("waiting", "starting"):
                    self._console.print(
                        f"{item.name}: {item.phase} {_remark(item.phase, item.start_s, item.last_exit)}".rstrip()
                    )


def first_request(state: MeshState, model: str, expected: list[str], console: Console) -> bool:
    """Asks, streams the answer to the terminal, draws the trace. False when there was no answer."""
    console.print(f"\n[bold]Asking[/] {model} through http://{state.addresses.ingress} as any client would:")
    prompt = demo.new_prompt()
    console.print(f"[cyan]> {prompt}[/]", highlight=False)
    try:
        answer = demo.ask(state.addresses.ingress, state.addresses.otlp, model, _write, prompt)
    except demo.NoAnswer as failure:
        console.print(f"\n[bold red]no answer:[/] {failure}")
        return False
    rate = answer.completion_tokens / max(1e-9, answer.total_s)
    counts = f"{answer.completion_tokens} tokens after {answer.prompt_tokens} of prompt ({answer.cached_tokens} cached)"
    console.print(
        f"\n[dim]{counts}, "
        f"first text after {answer.first_text_s * 1e3:.0f} ms, {rate:.0f} tokens/s, ended by {answer.finish}; "
        f"variant {answer.variant_digest[:19]}[/]\n"
    )
    tree, missing = demo.whole_trace(state.addresses.traces, answer.trace_id, expected)
    timeline.show(tree, console)
    if missing:
        console.print(f"[yellow]no span came from: {', '.join(missing)}[/]")
    return True


def next_steps(state: MeshState, model: str, console: Console) -> None:
    """Addresses and three things to try."""
    at = state.addresses
    body = f'{{"model":"{model}","stream":true,"max_tokens":64,"temperature":0.4,"prompt":"def read_lines(path):"}}'
    script = Path(sys.executable).with_name("autoglm")
    shown = script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script
    command = f"{shown}" if script.exists() else "python -m autoglm.cli"
    elsewhere = "" if at.ingress == "127.0.0.1:8080" else f"AUTOGLM_TARGET={at.ingress} "
    lines = (
        "",
        "[bold]The mesh is up.[/]",
        f"  REST and gRPC     http://{at.ingress}        (OpenAI REST under /v1)",
        f"  Envoy's page      http://{at.admin}",
        f"  traces            http://{at.traces}/traces   (OTLP/gRPC in: {at.otlp})",
        "",
        "[bold]Try[/]",
    )
    for line in lines:
        console.print(line, highlight=False)
    for line in (
        f"  curl -N http://{at.ingress}/v1/completions -H 'content-type: application/json' -d '{body}'",
        f'  python -c \'from openai import OpenAI; c = OpenAI(base_url="http://{at.ingress}/v1", api_key="-"); '
        f'print(c.completions.create(model="{model}", prompt="import os\\n", max_tokens=64, '
        "temperature=0.4).choices[0].text)'",
        f"  {elsewhere}{command} generate --temperature 0.4 'class Stack:'",
    ):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    console.print("\n  make status · make stop · edit istio/base/*.yaml: changes apply within a second\n", markup=False)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _components(state: MeshState) -> Table:
    table = Table.grid(padding=(0, 2))
    for item in state.processes:
        mark, style = MARKS.get(item.phase, ("?", ""))
        took = item.start_s or (time.time() - item.since_unix_s if item.phase == "starting" else 0.0)
        remark = _remark(item.phase, took, item.last_exit)
        if item.phase in ("backing off", "failed"):
            remark += f"  {item.last_line[:100]}"
        table.add_row(
            Text(mark, style=style), Text(item.name), Text(remark, style="dim" if item.phase != "failed" else "red")
        )
    return table


def _remark(phase: str, took_s: float, last_exit: str) -> str:
    if phase in ("backing off", "failed"):
        return f"{phase}: {last_exit}"
    return f"{took_s:.1f} s" if took_s else ("waits for others" if phase == "waiting" else "")
