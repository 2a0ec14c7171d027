"""`python -m services.mesh`: the whole mesh on one machine, behind a real Envoy, under the policy in istio/."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import typer
from rich.console import Console

from services.chassis.settings import read
from services.mesh import commands, model, policy, scrape, start, state, topology
from services.mesh.local import CannotStart, LocalMesh
from services.mesh.policy import PolicyError
from services.mesh.rundir import RunDirectory, write_atomically
from services.mesh.settings import MeshSettings
from services.mesh.state import MeshState
from services.mesh.topology import Topology, TopologyError
from services.mesh.translate import NodeSettings

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
console = Console(width=None if sys.stdout.isatty() else 160)
commands.add_to(app, console)


@app.command()
def run(
    keep_foreground: bool = typer.Option(False, "--keep-foreground", help="Stay until Ctrl-C, then stop the mesh."),
) -> None:
    """Start the mesh in the background, ask it something, show the trace. While it is up: only ask again."""
    from services.mesh import present  # the SDK and OpenTelemetry load while the mesh starts

    settings, directory = _begin()
    supervisor = None
    if directory.holder() is None:
        _check_policy(settings)
        _check_model(settings)
        console.print("[bold]Starting the mesh[/]")
        try:
            supervisor = start.start(directory, os.environ, dies_with_us=False)
        except OSError as error:
            _fail(_unusable(error))
    else:
        _check_same_model(settings, directory)
        console.print("The mesh is already up.")
    try:
        with present.StartScreen(console) as progress:
            current = start.wait_up(directory, supervisor, _patience(settings), progress.show)
        answered = present.first_request(current, _expected(settings), console)
        present.next_steps(current, console)
        if keep_foreground:
            console.print("Ctrl-C stops the mesh.")
            while directory.holder() is not None:
                time.sleep(0.2)
    except CannotStart as error:
        _fail(str(error))
    except KeyboardInterrupt:
        if supervisor is not None:
            start.stop(directory, settings.drain_grace_s, lambda _: None)
            console.print("stopped")
        raise typer.Exit(130) from None
    raise typer.Exit(0 if answered else 1)


@app.command()
def smoke(timeout_s: float = typer.Option(45.0, min=1, help="How long the mesh may take to come up.")) -> None:
    """A mesh of its own on free ports: start, ask, check answer and trace, stop. Exit status 0 or 1."""
    from services.mesh.smoke import smoke as judge

    settings, _ = _begin()
    _check_policy(settings)
    _check_model(settings)
    try:
        passed = judge(settings, _expected(settings), timeout_s, console)
    except OSError as error:
        _fail(_unusable(error))
    raise typer.Exit(0 if passed else 1)


@app.command()
def stop() -> None:
    """Drain and stop the mesh. Does nothing when none runs."""
    settings, directory = _begin()
    was_running = start.stop(directory, settings.drain_grace_s, lambda _: None)
    console.print("stopped" if was_running else "nothing was running")


@app.command()
def status(as_json: bool = typer.Option(False, "--json", help="Everything as JSON.")) -> None:
    """Processes, policy, Envoy's view of the endpoints, weights and fallbacks. Exit status 3 when no mesh runs."""
    from services.mesh import status as report

    _, directory = _begin()
    gathered = report.gather(_running(directory))
    if as_json:
        print(json.dumps(gathered, indent=1))
    else:
        report.show(gathered, console)


@app.command()
def rotate(timeout_s: float = typer.Option(10.0, min=1, help="How long Envoy may take to read them.")) -> None:
    """Renew every certificate now. New connections use them at once; open ones, and the streams on them, go on."""
    from services.mesh.rotation import NotRotated
    from services.mesh.rotation import rotate as renew

    _, directory = _begin()
    try:
        for item in renew(directory, _running(directory), timeout_s):
            console.print(f"{item.spiffe_id}  {item.serial}", highlight=False, soft_wrap=True)
    except NotRotated as error:
        _fail(str(error))


@app.command()
def validate(directory: Path | None = typer.Argument(None, help="Folder of Istio YAML. Default: istio/base")) -> None:
    """Check the traffic policy against the services of this mesh, and against Envoy. Prints every problem."""
    settings, _ = _begin()
    _check_policy(settings.model_copy(update={"policy_dir": directory or settings.policy_dir}), with_envoy=True)
    console.print("ok", style="green")


@app.command()
def access() -> None:
    """Print who may call what, as the policy in istio/base has it: the source of docs/access.md."""
    from services.mesh import access_table

    settings, _ = _begin()
    try:
        print(access_table.render(policy.load(settings.policy_dir)), end="")
    except (PolicyError, access_table.Undecided) as error:
        _fail(str(error))


@app.command()
def token(
    tenant: str = typer.Option(..., help="Whose requests they will be."),
    audience: str = typer.Option("autoglm", help="For whom the token is."),
    minutes: float = typer.Option(60, min=0.1, max=60 * 24 * 30, help="How long it is good."),
    region: str = typer.Option("", help="Where the tenant's data must stay (istio/clouds); empty: nothing is said."),
) -> None:
    """Print a token for a mesh under istio/components/jwt: curl -H "authorization: Bearer $(… token --tenant me)"."""
    from services.mesh.identity import Unusable
    from services.mesh.issuer import Issuer, is_tenant

    settings, directory = _begin()
    if not is_tenant(tenant):
        _fail("a tenant has 1 to 64 printable ASCII characters without spaces")
    try:
        issuer = Issuer.open(settings.issuer_dir or directory.issuer)
    except Unusable as error:
        _fail(str(error))
    print(issuer.token(tenant, audience, timedelta(minutes=minutes), datetime.now(UTC), region))


@app.command()
def trace(which: str = typer.Argument("last", help="A trace id, or `last`.")) -> None:
    """Show one trace as a tree."""
    from autoglm.cli import spans, timeline

    from services.mesh import demo

    _, directory = _begin()
    traces = _running(directory).addresses.traces
    try:
        if which == "last":
            found = demo.newest(traces, 1)
            which = str(found[0]["trace_id"]) if found else ""
        tree = spans.build(demo.fetch(traces, which) if which else [])
    except OSError as error:
        _fail(str(error))
    if not tree.roots:
        _fail("no such trace; the sink keeps the newest ones only")
    timeline.show(tree, console)


@app.command()
def prometheus(
    run_dir: list[Path] = typer.Option([], help="Run directory of a mesh; may be given again. Default: this one's."),
    interval_s: float = typer.Option(15.0, min=0.1, help="How often pages are scraped and rules evaluated."),
) -> None:
    """Write a Prometheus configuration for the meshes of this machine, and say how to start one with it."""
    _, directory = _begin()
    path = directory.root / "prometheus" / "prometheus.yml"
    found = scrape.configuration(run_dir or [directory.root], scrape.RULES, interval_s)
    write_atomically(path, json.dumps(found, indent=1))  # JSON is YAML
    console.print(f"written: {path}", markup=False, highlight=False, soft_wrap=True)
    data = path.with_name("data")
    console.print(
        f"start:   prometheus --config.file={path} --storage.tsdb.path={data} --web.listen-address=127.0.0.1:9090",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


@app.command(hidden=True)
def supervise() -> None:
    """Be the supervisor: what `run` starts in the background."""
    settings, directory = _begin()
    made = start.supervise(directory, "mesh", settings.log_bytes, settings.log_level, lambda: LocalMesh(settings))
    raise typer.Exit(made)


def _begin() -> tuple[MeshSettings, RunDirectory]:
    settings = read(MeshSettings)
    directory = RunDirectory(settings.run_dir)
    try:
        directory.holder()
    except OSError as error:
        _fail(_unusable(error))
    return settings, directory


def _unusable(error: OSError) -> str:
    return f"the run directory cannot be used: {error}; AUTOGLM_RUN_DIR names another"


def _running(directory: RunDirectory) -> MeshState:
    current = state.read(directory.state)
    if current is None or current.pid != directory.holder():
        console.print("no mesh is running; start it with: make run")
        raise typer.Exit(3)
    return current


def _check_policy(settings: MeshSettings, *, with_envoy: bool = False) -> None:
    """Exit status 1 with every problem, before anything is started."""
    from services.mesh import envoy
    from services.mesh.translate import translate

    try:
        processes = topology.load(settings.topology, settings.replicas, settings.is_own_model)
        known = topology.registry(processes, settings.namespace, settings.bind, ())
        planned = topology.instances(processes, itertools.count(1))
        loaded = policy.load(settings.policy_dir)
        # Warnings speak of endpoints: here of those that the topology would start.
        problems = policy.check(loaded, topology.registry(processes, settings.namespace, settings.bind, planned))
        for problem in problems:
            console.print(f"{problem.severity}: {problem}", markup=False, soft_wrap=True, highlight=False)
        if any(problem.severity == "error" for problem in problems):
            raise typer.Exit(1)
        if with_envoy:
            with tempfile.TemporaryDirectory() as scratch:
                node = _trial_node(processes, settings.namespace, Path(scratch))
                asyncio.run(envoy.validate(translate(loaded, known, node).static()))
    except PolicyError as error:
        for problem in error.problems:
            console.print(f"error: {problem}", markup=False, soft_wrap=True, highlight=False)
        raise typer.Exit(1) from None
    except (TopologyError, envoy.Invalid, envoy.EnvoyMissing) as error:
        _fail(str(error))


def _trial_node(processes: Topology, namespace: str, scratch: Path) -> NodeSettings:
    """A node with every sidecar, and certificates that nobody will ever use: Envoy looks whether the files exist."""
    from services.mesh.identity import Terms, write_trial

    supply = itertools.count(1)
    instances = topology.instances(processes, supply)
    write_trial(scratch / "identity", namespace, processes.services, Terms())
    return NodeSettings(
        run_directory=scratch,
        callers=topology.callers(processes, supply),
        sidecars=topology.sidecars(processes, namespace, instances),
        identities=scratch / "identity",
        namespace=namespace,
    )


def _check_model(settings: MeshSettings) -> None:
    """Exit status 1 before anything is started, when the model of one's own cannot be served."""
    if not settings.is_own_model:
        return
    try:
        console.print(model.check(settings), markup=False, highlight=False, soft_wrap=True)
    except model.UnusableModel as error:
        _fail(str(error))


def _check_same_model(settings: MeshSettings, directory: RunDirectory) -> None:
    """Exit status 1 when the mesh that runs serves another model than the one that is asked for."""
    current = state.read(directory.state)
    if current is None or not settings.is_own_model or current.pid != directory.holder():
        return
    if current.model_dir != settings.model_place or current.model != model.name(settings):
        _fail(f"the mesh that is up serves {current.model} ({current.model_dir}); stop it first: make stop")


def _expected(settings: MeshSettings) -> list[str]:
    """Who must appear in the trace of a chat request."""
    from services.mesh.demo import CLIENT
    from services.mesh.local import ENVOY

    services = topology.load(settings.topology, settings.replicas, settings.is_own_model).services
    return [CLIENT, ENVOY, *(name for name, spec in services.items() if any(item.count for item in spec.replicas))]


def _patience(settings: MeshSettings) -> float:
    return 3 * settings.start_timeout_s


def _fail(text: str) -> None:
    console.print(text, style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(1)


if __name__ == "__main__":
    app()
