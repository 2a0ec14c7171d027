"""One whole mesh on free ports, one request, one verdict. Leaves nothing running; keeps the logs of a failure."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from autoglm.cli import timeline
from rich.console import Console

from services.mesh import demo, ports, start
from services.mesh.demo import Answer
from services.mesh.local import CannotStart
from services.mesh.rundir import RunDirectory
from services.mesh.settings import FIXED_PORTS, MeshSettings
from services.mesh.state import MeshState

FINISHES = {"stop", "length"}


def smoke(settings: MeshSettings, expected: list[str], timeout_s: float, console: Console) -> bool:
    """Whether a mesh can be started, answers, and is seen in one trace. Stops it in any case."""
    settings.run_dir.mkdir(parents=True, exist_ok=True)
    directory = RunDirectory(Path(tempfile.mkdtemp(prefix="smoke-", dir=settings.run_dir)))
    supervisor = start.start(directory, _environment(settings, directory.root), dies_with_us=True)
    began = time.monotonic()
    problems: list[str] = []
    try:
        state = start.wait_up(directory, supervisor, timeout_s, lambda _: None)
        console.print(f"up in {time.monotonic() - began:.1f} s on {state.addresses.ingress}")
        problems = _judge(state, expected, console)
    except (CannotStart, demo.NoAnswer, OSError) as error:
        problems = [str(error)]
    finally:
        start.stop(directory, settings.drain_grace_s, lambda _: None)
        supervisor.wait()
    for problem in problems:
        console.print(f"FAILED: {problem}", style="red", markup=False, soft_wrap=True)
    if problems:
        console.print(f"logs are kept in {directory.logs}")
    else:
        shutil.rmtree(directory.root, ignore_errors=True)
        console.print(f"ok in {time.monotonic() - began:.1f} s", style="green")
    return not problems


def _judge(state: MeshState, expected: list[str], console: Console) -> list[str]:
    at, question = state.addresses, demo.new_question(state)
    answer = demo.ask(at.ingress, at.otlp, state.model, lambda _: None, question, demo.PATIENCE_S)
    tree, missing = demo.whole_trace(state.addresses.traces, answer.trace_id, expected)
    for line in timeline.plain(tree):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    found = flaws(answer)
    if missing:
        found.append(f"the trace has no span of {', '.join(missing)}")
    if not tree.has_root or tree.orphans:
        found.append(f"the trace is not one tree: {tree.orphans} spans without their parent")
    return found


def flaws(answer: Answer) -> list[str]:
    """What is wrong with the answer."""
    checks = {
        "the answer has no text": answer.text.strip() != "",
        f"the finish reason is {answer.finish!r}": answer.finish in FINISHES,
        "no prompt tokens were counted": answer.prompt_tokens > 0,
        "no generated tokens were counted": answer.completion_tokens > 0,
        "the answer names no variant": answer.variant_digest != "",
    }
    return [flaw for flaw, is_fine in checks.items() if not is_fine]


def _environment(settings: MeshSettings, root: Path) -> Mapping[str, str]:
    supply = ports.free(settings.bind)
    chosen = {f"AUTOGLM_{name.upper()}": str(next(supply)) for name, _ in FIXED_PORTS}
    return {**os.environ, **chosen, "AUTOGLM_RUN_DIR": str(root), "AUTOGLM_OTLP_FORWARD": ""}
