"""`python -m services.mesh.clouds`: several clouds on one machine, each a whole mesh behind an Envoy of its own."""

from __future__ import annotations

import os
import sys

import typer
from rich.console import Console

from services.chassis.settings import read
from services.mesh import start
from services.mesh.clouds import asking, network, state
from services.mesh.clouds.settings import CloudsSettings
from services.mesh.clouds.state import CloudsState
from services.mesh.clouds.supervise import Clouds
from services.mesh.local import CannotStart
from services.mesh.rundir import RunDirectory

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
LOG_BYTES = 1 << 20
"""Of the clouds' own log; each mesh bounds its own."""
console = Console(width=None if sys.stdout.isatty() else 160)


@app.command()
def run() -> None:
    """Start the clouds in the background, ask each something, say what to try next. While they are up: only ask."""
    from services.mesh.clouds import present

    settings, directory = _begin()
    supervisor = None
    if directory.holder() is None:
        console.print("[bold]Starting the clouds[/] (each a whole mesh; on a small machine this takes a minute)")
        supervisor = start.start(directory, os.environ, dies_with_us=False, module="services.mesh.clouds")
    try:
        current = present.wait_up(directory, supervisor, settings.clouds_start_timeout_s, console)
        answered = present.introduce(current, console)
    except CannotStart as error:
        _fail(str(error))
    except KeyboardInterrupt:
        if supervisor is not None:
            start.stop(directory, settings.drain_grace_s, lambda _: None)
            console.print("stopped")
        raise typer.Exit(130) from None
    raise typer.Exit(0 if answered else 1)


@app.command()
def smoke() -> None:
    """Clouds of their own, for a moment: start, check, stop. Exit status 0 or 1."""
    from services.mesh.clouds.smoke import smoke as judge

    settings, _ = _begin()
    raise typer.Exit(0 if judge(settings, console) else 1)


@app.command()
def stop() -> None:
    """Drain and stop all clouds. Does nothing when none runs."""
    settings, directory = _begin()
    was_running = start.stop(directory, settings.drain_grace_s, lambda _: None)
    if not was_running and network.is_possible():
        network.remove(network.network(directory.root))  # what a killed run left behind
    console.print("stopped" if was_running else "nothing was running")


@app.command()
def status() -> None:
    """Which clouds are up, where, and under which policy. Exit status 3 when none runs."""
    from services.mesh.clouds import present

    _, directory = _begin()
    present.show(_running(directory), console)


@app.command()
def token(
    tenant: str = typer.Option(asking.TENANT, help="Whose requests they will be."),
    region: str = typer.Option(
        "", help="The cloud in which the tenant's data must stay; empty: the caller may choose."
    ),
) -> None:
    """Print a token that every cloud takes."""
    from services.mesh.issuer import is_tenant

    settings, directory = _begin()
    if not is_tenant(tenant):
        _fail("a tenant has 1 to 64 printable ASCII characters without spaces")
    try:
        print(asking.token(settings.issuer_dir or directory.issuer, tenant, region))
    except asking.NoAnswer as error:
        _fail(str(error))


@app.command(hidden=True)
def supervise() -> None:
    """Be the supervisor: what `run` starts in the background."""
    settings, directory = _begin()
    raise typer.Exit(start.supervise(directory, "clouds", LOG_BYTES, settings.log_level, lambda: Clouds(settings)))


def _begin() -> tuple[CloudsSettings, RunDirectory]:
    settings = read(CloudsSettings)
    return settings, RunDirectory(settings.clouds_dir)


def _running(directory: RunDirectory) -> CloudsState:
    current = state.read(directory)
    if current is None or current.pid != directory.holder():
        console.print("no clouds are running; start them with: make clouds")
        raise typer.Exit(3)
    return current


def _fail(text: str) -> None:
    console.print(text, style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(1)


if __name__ == "__main__":
    app()
