"""`autoglm model push` and `pull`: a model's files into the cache of a mesh and out of it, by digest, with bars."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TypeAlias

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from autoglm.artifacts import ArtifactClient, describe, look
from autoglm.cli import meshes
from autoglm.cli import options as opt
from autoglm.cli.output import Output
from autoglm.errors import UnavailableError

CacheAddress: TypeAlias = Annotated[
    str | None,
    typer.Option("--cache", help="host:port of a cache service itself. Default: that of the mesh on this machine."),
]

app = typer.Typer(help="Models by digest.", no_args_is_help=True)


@app.callback()
def main() -> None:
    """Models by digest: what is pushed once, every worker of every cloud that shares the store can fetch."""


@app.command()
def push(
    place: Annotated[Path, typer.Argument(metavar="DIR|FILE", help="A model's directory, or a .gguf file.")],
    cache: CacheAddress = None,
    run_dir: opt.RunDirectories = None,
    json: opt.Json = False,
) -> None:
    """Put a model's files into a cache and print the digest that names it: make run MODEL=sha256:…"""
    output = Output(json)
    address = cache or cache_of(run_dir or [])
    local = look(place)
    for path in local.left_out:
        output.note(f"left out: {path.name}")
    new = 0
    with _bar(output) as progress, ArtifactClient(address) as client:
        hashing = progress.add_task("hashing", total=local.total_bytes)
        made = describe(local.files, lambda count: progress.advance(hashing, count))
        sending = progress.add_task("sending", total=made.total_bytes)
        by_name = {path.name: path for path in local.files}
        for file in made.files:
            new += client.put_file(by_name[file.name], file, lambda count: progress.advance(sending, count))
        client.put_manifest(made)
    if json:
        output.record({"digest": made.digest, "files": len(made.files), "new": new, "bytes": made.total_bytes})
    else:
        output.note(f"{len(made.files)} files, {new} of them new, {made.total_bytes / 1e6:.1f} MB")
        output.write(f"{made.digest}\n")


@app.command()
def pull(
    digest: Annotated[str, typer.Argument(metavar="sha256:…", help="What `push` printed.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", file_okay=False, help="Where the files go.")],
    cache: CacheAddress = None,
    run_dir: opt.RunDirectories = None,
    json: opt.Json = False,
) -> None:
    """Take a model's files out of a cache, or of the object store behind it, each proved by its digest."""
    output = Output(json)
    with _bar(output) as progress, ArtifactClient(cache or cache_of(run_dir or [])) as client:
        found = client.get_manifest(digest)
        directory.mkdir(parents=True, exist_ok=True)
        fetching = progress.add_task("fetching", total=found.total_bytes)
        for file in found.files:
            client.get_file(file, directory, lambda count: progress.advance(fetching, count))
    if json:
        output.record({"digest": digest, "files": len(found.files), "bytes": found.total_bytes})
    else:
        output.write(f"{directory}\n")


def cache_of(directories: Sequence[Path]) -> str:
    """The address of the cache process of a mesh on this machine. Raises UnavailableError."""
    for mesh in meshes.find(directories):
        host = mesh.addresses["admin"].rpartition(":")[0]  # services listen where only this machine reaches them
        for process in mesh.state["processes"]:
            if process["service"] == "cache" and process["phase"] == "ready" and mesh.phase != "gone":
                return f"{host}:{process['ports']['grpc']}"
    raise UnavailableError(
        "no mesh with a cache runs here; start one with `make run`, or name one with --cache host:port"
    )


@contextmanager
def _bar(output: Output) -> Iterator[Progress]:
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not (output.is_person and console.is_terminal)) as progress:
        yield progress
