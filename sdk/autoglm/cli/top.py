"""`autoglm top`: all clouds of this machine at a glance, renewed until Ctrl-C; or once, or as JSON, for scripts."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from autoglm.cli import figures, meshes
from autoglm.cli.figures import Cloud, Look
from autoglm.cli.meshes import Running, Sample
from autoglm.cli.output import Output
from autoglm.errors import UnavailableError

WINDOW_LOOKS = 10
"""Rates and latencies are those of the last ten looks."""


def run(directories: Sequence[Path], interval_s: float, once: bool, output: Output) -> None:
    """Looks, waits, looks again. With `once`, or in a pipe, two looks and one answer."""
    history: dict[Path, deque[Look]] = {}
    observe(directories, history)
    if once or not output.is_person:
        time.sleep(interval_s)
        _write(observe(directories, history), output)
        return
    with Live(console=output.console, auto_refresh=False, screen=False) as live:
        while True:
            live.update(draw(observe(directories, history)), refresh=True)
            time.sleep(interval_s)


def observe(directories: Sequence[Path], history: dict[Path, deque[Look]]) -> list[Cloud]:
    """A look at every mesh; the figures are of the time since the oldest look that is remembered."""
    clouds = []
    for running in meshes.find(directories):
        looks = history.setdefault(running.root, deque(maxlen=WINDOW_LOOKS))
        if running.phase != "up":
            looks.clear()
            clouds.append(Cloud(running.cloud, running.phase))
            continue
        looks.append(look(running))
        clouds.append(figures.cloud(running.cloud, running.phase, running.state["policy"], looks[0], looks[-1]))
    return clouds


def look(running: Running) -> Look:
    """Asks every metrics page of the mesh at once."""
    host = running.addresses["admin"].rpartition(":")[0]
    ports = {str(item["name"]): item["metrics_port"] for item in running.state["processes"] if item["metrics_port"]}
    pages: dict[str, tuple[Sample, ...]] = {}
    unanswered: list[str] = []
    with ThreadPoolExecutor(max_workers=8) as pool:
        asked = {name: pool.submit(meshes.get, f"{host}:{port}", "/metrics") for name, port in ports.items()}
        for name, answer in asked.items():
            try:
                pages[name] = tuple(meshes.samples(answer.result().decode("utf-8", "replace")))
            except (UnavailableError, LookupError):
                unanswered.append(name)
    return Look(time.monotonic(), pages, tuple(unanswered))


def draw(clouds: Sequence[Cloud]) -> RenderableType:
    """Three tables: clouds, workers, weights; and who did not answer."""
    above = _table(
        "cloud", "state", "req/s", "err/s", "tok/s", "run", "queue", "cache", "first token", "whole", "fallb."
    )
    below = _table("cloud", "worker", "model", "version", "sparsity", "tok/s", "run", "queue", "KV", "cache")
    weights = _table("cloud", "route", "goes to", "weight")
    notes = []
    for item in clouds:
        above.add_row(*_cloud_row(item))
        for worker in item.workers:
            how = f"{worker.precision} {worker.sparsity}".strip() or "-"
            below.add_row(
                item.name, worker.name, worker.model, worker.version or "-", how, f"{worker.tokens_per_s:.1f}",
                f"{worker.running:g}", f"{worker.waiting:g}", _percent(worker.kv_used), _percent(worker.prefix_hits),
            )  # fmt: skip
        for weight in item.weights:
            weights.add_row(item.name, str(weight["route"]), str(weight["destination"]), f"{weight['weight']} %")
        notes += [Text(f"{item.name}: {name} does not answer", style="yellow") for name in item.unanswered]
    tables = [table for table in (above, below, weights) if table.row_count]
    return Group(*(part for table in tables for part in (table, Text())), *notes)


def _cloud_row(item: Cloud) -> tuple[str | Text, ...]:
    return (
        item.name,
        Text(item.phase, style="green" if item.phase == "up" else "red"),
        f"{item.requests_per_s:.1f}",
        Text(f"{item.errors_per_s:.1f}", style="red" if item.errors_per_s else ""),
        f"{item.tokens_per_s:.1f}",
        f"{item.running:g}",
        f"{item.waiting:g}",
        _percent(item.cache_hits),
        f"{_seconds(item.first_token_p50_s)} / {_seconds(item.first_token_p99_s)}",
        f"{_seconds(item.request_p50_s)} / {_seconds(item.request_p99_s)}",
        Text(f"{item.fallbacks:g}", style="yellow" if item.fallbacks else ""),
    )


def _write(clouds: Sequence[Cloud], output: Output) -> None:
    if output.as_json:
        for item in clouds:
            output.record(asdict(item))
    elif output.is_person:
        output.console.print(draw(clouds))
    else:
        output.rows(
            ("cloud", "state", "requests_per_s", "tokens_per_s", "running", "waiting", "first_token_p50_s"),
            [
                (c.name, c.phase, round(c.requests_per_s, 2), round(c.tokens_per_s, 2), c.running, c.waiting,
                 "-" if c.first_token_p50_s is None else round(c.first_token_p50_s, 4))
                for c in clouds
            ],
        )  # fmt: skip


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"
