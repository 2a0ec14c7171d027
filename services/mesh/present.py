"""What `make run` shows: the mesh coming up, the first answer as it streams, its trace, and what to try next."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from autoglm.cli import timeline
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from services.mesh import demo
from services.mesh.settings import BUNDLED_MODEL
from services.mesh.state import MeshState, Progress

MARKS = {
    "waiting": ("·", "dim"),
    "starting": ("…", "yellow"),
    "ready": ("✓", "green"),
    "backing off": ("!", "red"),
    "failed": ("✗", "bold red"),
    "stopping": ("…", "yellow"),
    "stopped": ("-", "dim"),
}


CODE_STARTS = ("def read_lines(path):", "import os\\n", "class Stack:")
TEXT_STARTS = ("The first day of spring", "A good teacher", "Once upon a time")
BAR_CELLS = 24


class StartScreen:
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
            if item.phase == "starting" and item.progress is not None:
                self._say_progress(item.name, item.progress)
            elif self._said.get(item.name) != item.phase:
                self._said[item.name] = item.phase
                if item.phase not in ("waiting", "starting"):
                    self._console.print(
                        f"{item.name}: {item.phase} {_remark(item.phase, item.start_s, item.last_exit)}".rstrip()
                    )

    def _say_progress(self, name: str, progress: Progress) -> None:
        """Each tenth of the way once."""
        tenth = 10 * progress.done // progress.total if progress.total else 0
        if self._said.get(name) != (said := f"{progress.doing} {tenth}"):
            self._said[name] = said
            self._console.print(f"{name}: {progress_text(progress)}", markup=False, highlight=False)


def first_request(state: MeshState, expected: list[str], console: Console) -> bool:
    """Asks, streams the answer to the terminal, draws the trace. False when there was no answer."""
    at = state.addresses
    console.print(f"\n[bold]Asking[/] {state.model} through http://{at.ingress} as any client would:")
    try:
        question = demo.new_question(state)
        how = "" if question.is_chat else "(it has no chat template, so this text is continued)"
        console.print(f"[cyan]> {question.text}[/] {how}", highlight=False)
        answer = demo.ask(at.ingress, at.otlp, state.model, _write, question, demo.PATIENCE_S)
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


def next_steps(state: MeshState, console: Console) -> None:
    """Addresses and three things to try."""
    at, model = state.addresses, state.model
    is_bundled = Path(state.model_dir) == BUNDLED_MODEL.absolute()
    first, second, third = CODE_STARTS if is_bundled else TEXT_STARTS
    body = f'{{"model":"{model}","stream":true,"max_tokens":64,"temperature":0.4,"prompt":"{first}"}}'
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
        f'print(c.completions.create(model="{model}", prompt="{second}", max_tokens=64, '
        "temperature=0.4).choices[0].text)'",
        f"  {elsewhere}{command} generate --temperature 0.4 '{third}'",
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
        if item.phase == "starting" and item.progress is not None:
            remark += f"  {progress_text(item.progress)}"
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


def progress_text(progress: Progress) -> str:
    """How far a long start is, as a bar and in words."""
    if not progress.total:
        return f"{progress.doing}: another process is at it, {progress.seconds:.0f} s"
    filled = min(BAR_CELLS, BAR_CELLS * progress.done // progress.total)
    left_s = progress.seconds * (progress.total - progress.done) / max(1, progress.done)
    bar = "█" * filled + "░" * (BAR_CELLS - filled)
    return f"{progress.doing} {bar} {progress.done >> 20} of {progress.total >> 20} MiB, {left_s:.0f} s left"
