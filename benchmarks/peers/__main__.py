"""`python -m benchmarks.peers`: our engine beside llama.cpp, OpenVINO and ONNX Runtime, on the same random weights.

Makes the peers' environments and models when they are missing, measures everything side by side and writes
peers.json, peers.md and peers.svg into benchmarks/results. Ends with one line per bar.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib import util
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.peers import plot, summary, table, wall
from benchmarks.peers.child import Child, Failed
from benchmarks.peers.contestants import Contestant, contestants
from benchmarks.peers.environments import REPOSITORY, Environments, Unavailable
from benchmarks.peers.interleave import Block, Entrant, Work, measure, tune
from benchmarks.peers.shapes import SHAPES, Shape

RESULTS = Path(__file__).resolve().parents[1] / "results"
COLD_BYTES = 1 << 30
CURVE = (1, 2, 4, 8, 16, 32)
CURVE_AT = ("q05", "glm-tiny")
SINGLE_ONLY = ("s14",)
"""Shapes whose bars are all at batch 1."""
BATCH_PROMPT = 32
"""Tokens of each prompt in a batch; short, for most peers compute every one of them before the steps that count."""


@dataclass(frozen=True, slots=True)
class Settings:
    """One run."""

    rounds: int
    """Good blocks per kind of work."""
    curve_rounds: int
    threads: int
    seed: int
    steal_limit: float
    """Largest share of stolen processor time in a block that counts."""
    limit_s: float
    """Longest answer of one measured process."""
    only: tuple[str, ...]
    """Names of contestants start with one of these; empty: all take part."""
    works: tuple[str, ...]
    """Kinds of work; empty: all."""
    long_rounds: int
    """The same for the longest prefill, which takes peers up to a minute."""
    steps: int
    """Decode steps of one measurement."""
    reuses_tuning: bool
    """Options tuned by an earlier run of the same work are taken as they are."""
    skipped: tuple[str, ...]
    """SHAPE:WORK that is left out."""


def works(shape: Shape, settings: Settings) -> list[Work]:
    """What is measured at a shape, bars first."""
    steps = settings.steps
    found = [Work("decode batch 1", "decode", 1, new=steps)]
    if shape.name not in SINGLE_ONLY:
        found += [
            Work("decode batch 8", "decode", 8, BATCH_PROMPT, steps),
            Work("prefill 512", "prefill", tokens=512),
            Work("prefill 2048", "prefill", tokens=2048, tuned_as="prefill 512"),
        ]
    if shape.name in CURVE_AT:
        found += [
            Work(f"decode batch {n}", "decode", n, BATCH_PROMPT, steps, for_bars=False, tuned_as="decode batch 8")
            for n in CURVE
            if n not in (1, 8)
        ]
    return [
        work
        for work in found
        if (not settings.works or work.name in settings.works) and f"{shape.name}:{work.name}" not in settings.skipped
    ]


def compare(shape: Shape, environments: Environments, settings: Settings, walls: wall.Meter) -> dict[str, Any]:
    """Everything about one shape, for the result file, with its section of the page under `section`."""
    taking_part = [c for c in contestants(shape) if not settings.only or c.name.startswith(settings.only)]
    reasons: dict[str, str] = {}
    facts: dict[str, Any] = {}
    blocks: dict[str, list[Block]] = {}
    discarded: dict[str, list[Block]] = {}
    plan = works(shape, settings)
    with ExitStack() as stack:
        entrants = []
        for contestant in taking_part:
            try:
                entrant, known = _enter(contestant, shape, environments, settings, plan, stack)
            except (Unavailable, Failed) as error:
                reasons[contestant.name] = str(error)
                print(f"{shape.name} {contestant.name}: not measured: {error}", flush=True)
                continue
            entrants.append(entrant)
            facts[contestant.name] = known
        model_bytes = {name: int(known["model_bytes"]) for name, known in facts.items()}
        working_set = max(model_bytes.values(), default=COLD_BYTES) if shape.is_cache_resident else COLD_BYTES
        for work in plan:
            print(f"{shape.name} {work.name}", flush=True)
            rounds = settings.rounds if work.for_bars else settings.curve_rounds
            if work.tokens > 1024:
                rounds = settings.long_rounds
            runs = [
                e for e in entrants if work.for_bars or e.name.startswith(("ours", "llama.cpp Q8_0", "llama.cpp Q4_0"))
            ]
            reading: Callable[[], float] = (lambda: walls.now(working_set)) if work.op == "decode" else (lambda: 0.0)
            good, bad = measure(runs, work, rounds, settings.seed, settings.steal_limit, reading, reasons)
            blocks[work.name], discarded[work.name] = good, bad
            for name, found in summary.figures(good).items():
                print(f"  {name}: {found.median:.1f} ({found.low:.1f} to {found.high:.1f})", flush=True)
        for entrant in entrants:
            try:
                facts[entrant.name] |= entrant.child.ask(op="memory")
            except Failed as error:
                facts[entrant.name]["peak_rss_bytes"] = f"not measured: {error}"
    return {
        "shape": asdict(shape),
        "contestants": facts,
        "not_measured": reasons,
        "tokens_per_s": {
            work: {name: asdict(found) for name, found in summary.figures(those).items()}
            for work, those in blocks.items()
        },
        "wall_shares": summary.wall_shares(blocks.get("decode batch 1", []), 1, model_bytes),
        "bars": [asdict(bar) for bar in summary.bars(shape.name, blocks, taking_part, model_bytes)],
        "blocks": summary.record(blocks),
        "discarded_blocks": summary.record(discarded),
        "section": table.section(shape, plan, blocks, taking_part, model_bytes, reasons),
    }


def _enter(
    contestant: Contestant,
    shape: Shape,
    environments: Environments,
    settings: Settings,
    plan: list[Work],
    stack: ExitStack,
) -> tuple[Entrant, dict[str, Any]]:
    """Starts, loads and tunes one contestant. Raises Unavailable or Failed."""
    model = contestant.model(environments, shape)
    python = Path(sys.executable) if contestant.is_ours else environments.python(contestant.peer)
    log = environments.folder / f"logs/{contestant.peer}-{shape.name}.log"
    child = Child(python, contestant.peer, log, settings.limit_s)
    stack.callback(child.close)
    answer = child.ask(op="load", model=str(model), threads=settings.threads, options=contestant.options)
    kept = environments.folder / f"tuning/{shape.name}-{contestant.name.replace(' ', '-')}.json"
    options, tried = _tuned(child, contestant, plan, kept, settings.reuses_tuning)
    known = {"bits": contestant.bits, "head_bits": contestant.head_bits} | answer["facts"]
    print(f"{shape.name} {contestant.name}: loaded", flush=True)
    return Entrant(contestant.name, child, options), known | {"tuned": options, "tuning_log": tried}


def _tuned(
    child: Child, contestant: Contestant, plan: list[Work], kept: Path, reuses: bool
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Options by work and the log of what was tried: as an earlier run kept them, if wanted and complete."""
    if reuses and kept.exists():
        earlier = json.loads(kept.read_text())
        options = earlier["options"]
        for work in plan:
            options.setdefault(work.name, options.get(work.tuned_as))
        if all(options[work.name] is not None for work in plan):
            return options, earlier["log"]
    options, tried = tune(child, plan, contestant.tunes, repeats=1)
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps({"options": options, "log": tried}, indent=1) + "\n")
    return options, tried


def main(
    shapes: Annotated[str, typer.Option(help="comma-separated; " + ", ".join(SHAPES))] = ",".join(SHAPES),
    rounds: Annotated[int, typer.Option(min=1, help="good blocks per kind of work")] = 5,
    curve_rounds: Annotated[int, typer.Option(min=1, help="the same for the batch curve")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="of each engine")] = 2,
    seed: Annotated[int, typer.Option(help="of the order within blocks")] = 0,
    steal_limit: Annotated[float, typer.Option(help="stolen share above which a block does not count")] = 0.01,
    limit_s: Annotated[float, typer.Option(help="longest answer of a measured process")] = 900.0,
    only: Annotated[str, typer.Option(help="comma-separated beginnings of contestants' names")] = "",
    work: Annotated[str, typer.Option(help="comma-separated kinds of work")] = "",
    name: Annotated[str, typer.Option(help="of the result files")] = "peers",
    long_rounds: Annotated[int, typer.Option(min=1, help="good blocks of the longest prefill")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="decode steps of one measurement")] = 32,
    reuse_tuning: Annotated[bool, typer.Option(help="take options that an earlier run tuned")] = False,
    skip: Annotated[str, typer.Option(help="comma-separated SHAPE:WORK to leave out, such as g15:prefill 2048")] = "",
    prepare: Annotated[bool, typer.Option(help="only make environments and models")] = False,
) -> None:
    """Compare; exit code 1 when a bar was missed."""
    chosen = [SHAPES[each] for each in _listed(shapes)]
    environments = Environments(Path(os.environ.get("AUTOGLM_PEERS_DIR", REPOSITORY / ".cache/peers")))
    settings = Settings(
        rounds,
        curve_rounds,
        threads,
        seed,
        steal_limit,
        limit_s,
        _listed(only),
        _listed(work),
        long_rounds,
        steps,
        reuse_tuning,
        _listed(skip),
    )
    if prepare:
        _prepare(chosen, environments, settings)
        return
    print("the wall", flush=True)
    meter = wall.Meter(wall.build(environments.folder / "wall"), threads)
    walls = [asdict(found) for found in meter.survey()]
    found = {shape.name: compare(shape, environments, settings, meter) for shape in chosen}
    sections = [result.pop("section") for result in found.values()]
    bars = [summary.Bar(**bar) for result in found.values() for bar in result["bars"]]
    RESULTS.mkdir(exist_ok=True)
    record = {
        "name": name,
        "commit": _commit(),
        "command": "python -m benchmarks.peers " + " ".join(sys.argv[1:]),
        "machine": _machine(),
        "unix_s": int(time.time()),
        "settings": asdict(settings),
        "wall": walls,
        "bars": [asdict(bar) for bar in bars],
        "shapes": found,
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(table.page(sections, walls, bars, _machine()["processor"]))
    if util.find_spec("matplotlib"):
        plot.draw(found, RESULTS / f"{name}.svg")
    else:
        print("no picture: matplotlib is not installed (dependency group bench)", file=sys.stderr)
    for bar in bars:
        print(f"{bar.name}  {bar.value}  {bar.target}  {'ok' if bar.is_met else 'missed'}")
    raise typer.Exit(0 if all(bar.is_met for bar in bars) else 1)


def _prepare(chosen: list[Shape], environments: Environments, settings: Settings) -> None:
    for shape in chosen:
        for contestant in contestants(shape):
            if settings.only and not contestant.name.startswith(settings.only):
                continue
            try:
                print(f"{shape.name} {contestant.name}: {contestant.model(environments, shape)}", flush=True)
            except Unavailable as error:
                print(f"{shape.name} {contestant.name}: not to be had: {error}", flush=True)


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False).stdout.strip()


def _machine() -> dict[str, Any]:
    cpu = Path("/proc/cpuinfo")
    pairs = [line.partition(":") for line in cpu.read_text().splitlines()] if cpu.exists() else []
    known = {key.strip(): value.strip() for key, _, value in pairs}
    wanted = ("avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16")
    return {
        "processor": known.get("model name", "unknown"),
        "instructions": [name for name in wanted if name in known.get("flags", "").split()],
        "cores": os.cpu_count(),
        "system": platform.platform(),
    }


if __name__ == "__main__":
    typer.run(main)
