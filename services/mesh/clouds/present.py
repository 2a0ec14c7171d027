"""What `make clouds` shows: the clouds coming up, where each listens, an answer through each, and what to try next."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from services.mesh import start
from services.mesh.clouds import asking, state
from services.mesh.clouds.state import CloudsState, CloudState
from services.mesh.local import CannotStart
from services.mesh.rundir import RunDirectory

POLL_S = 0.1


def wait_up(
    directory: RunDirectory, supervisor: subprocess.Popen[bytes] | None, timeout_s: float, console: Console
) -> CloudsState:
    """Returns when every cloud is up. Raises `CannotStart` with the reason."""
    deadline = time.monotonic() + timeout_s
    said: set[str] = set()
    while time.monotonic() < deadline:
        has_ended = supervisor is not None and supervisor.poll() is not None
        holder = directory.holder()
        current = state.read(directory)
        if current is not None and current.pid == holder:
            for cloud in current.clouds:
                if cloud.phase == "ready" and cloud.name not in said:
                    said.add(cloud.name)
                    console.print(f"  {cloud.name} is up", highlight=False)
            if current.phase == "up":
                return current
            if current.phase == "failed":
                raise CannotStart(current.reason)
        if has_ended or (supervisor is None and holder is None):
            reason = current.reason if current is not None and current.phase == "failed" else ""
            raise CannotStart(reason or start.last_words(directory) or "the supervisor ended without a word")
        time.sleep(POLL_S)
    raise CannotStart(f"not up after {timeout_s:g} s; see the logs in {directory.logs} and below {directory.root}")


def show(current: CloudsState, console: Console) -> None:
    """The table of the clouds."""
    table = Table(box=None, padding=(0, 2))
    for title in ("cloud", "locality", "state", "REST and gRPC", "Envoy's page", "traces", "policy"):
        table.add_column(title)
    for cloud in current.clouds:
        mesh = cloud.mesh
        where = (mesh.addresses.ingress, mesh.addresses.admin, mesh.addresses.traces) if mesh is not None else ("",) * 3
        phase = mesh.phase if mesh is not None else cloud.phase
        if current.network == "namespaces" and mesh is not None:  # it listens on the loopback of its own namespace
            where = (where[0], "", where[2])
        table.add_row(
            cloud.name, cloud.locality, phase, *(f"http://{at}" if at else "-" for at in where), _policy(cloud)
        )
    console.print(table)
    if current.remark:
        console.print(f"[yellow]{current.remark}[/]", highlight=False)
    way = f"{current.one_way_ms:g} ms one way between any two, by a proxy of their own"
    if current.network == "namespaces":
        console.print(f"Each is in a network namespace of its own (autoglm-{current.key}-…); {way}.", highlight=False)
    else:
        console.print(
            f"[yellow]On loopback addresses, not in namespaces[/] ({current.network.partition(': ')[2]}); {way}.",
            highlight=False,
        )


def introduce(current: CloudsState, console: Console) -> bool:
    """Table, an answer through each, next steps. False when a cloud gave no answer."""
    show(current, console)
    console.print(f"\n[bold]Asking each cloud[/] to continue {asking.PROMPT!r}, seed {asking.SEED}:", highlight=False)
    answers = {}
    bearer = asking.token(current.issuer)
    for cloud in current.clouds:
        mesh = cloud.mesh
        try:
            if mesh is None:
                raise asking.NoAnswer("it is not up")
            answer = answers[cloud.name] = asking.ask(mesh.addresses.ingress, mesh.model, bearer, cloud.name)
        except asking.NoAnswer as failure:
            console.print(f"  {cloud.name:6} [red]no answer:[/] {failure}", highlight=False)
            continue
        ids = " ".join(map(str, answer.token_ids[:8]))
        console.print(
            f"  {cloud.name:6} {len(answer.token_ids)} tokens ({ids} …) in {answer.total_s:.2f} s, "
            f"variant {answer.variant_digest[:19]}",
            highlight=False,
        )
    if len({(answer.token_ids, answer.variant_digest) for answer in answers.values()}) == 1:
        console.print("  [green]the same tokens from every cloud[/]")
    _next_steps(current, console)
    return len(answers) == len(current.clouds)


def _next_steps(current: CloudsState, console: Console) -> None:
    first, last = current.clouds[0], current.clouds[-1]
    python = ".venv/bin/python" if Path(".venv/bin/python").exists() else "python"
    mesh = first.mesh
    ingress = mesh.addresses.ingress if mesh is not None else ""
    model = mesh.model if mesh is not None else ""
    workers = [p for p in (last.mesh.processes if last.mesh is not None else []) if p.service == "sparse-inference"]
    body = f'{{"model":"{model}","max_tokens":32,"prompt":"def read_lines(path):"}}'
    lines = [
        "",
        "Try",
        f"  TOKEN=$({python} -m services.mesh.clouds token --tenant me)   # every door asks for one; any door takes it",
        f'  curl -s http://{ingress}/v1/completions -H "authorization: Bearer $TOKEN" '
        f"-H 'content-type: application/json' -d '{body}'",
        f"  the same with -H 'x-data-region: {last.name}', or a token made with --region {last.name}: "
        "served there, or not at all",
    ]
    if workers:
        lines.append(
            f"  kill -9 {workers[0].pid}   # {last.name}'s worker: another cloud serves its requests meanwhile"
        )
    if current.network == "namespaces":
        lines.append(
            f"  ip netns exec autoglm-{current.key}-{last.name} ip link set eth0 down   # {last.name} vanishes"
        )
    lines += [
        f"  edit istio/clouds/{last.name}/canary.yaml or distribution.yaml: it applies within a second, there only",
        f"  {python} -m services.mesh.clouds status · make clouds-stop",
        "",
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _policy(cloud: CloudState) -> str:
    mesh = cloud.mesh
    if mesh is None:
        return "-"
    return f"{mesh.policy.version}{' (an edit was refused)' if mesh.policy.refused else ''}"
