"""The commands about policy: `check`, `diff` and `explain`. Nothing here changes anything."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from services.chassis.settings import read
from services.mesh import topology
from services.mesh.registry import Registry
from services.mesh.settings import MeshSettings
from services.mesh.topology import TopologyError

if TYPE_CHECKING:
    from services.mesh.checking import Verdict

REPOSITORY = Path(__file__).resolve().parents[2]
AsJson = Annotated[bool, typer.Option("--json", help="Everything as JSON.")]


def add_to(app: typer.Typer, console: Console) -> None:
    """Registers the commands."""

    @app.command()
    def check(
        directories: Annotated[
            list[Path] | None, typer.Argument(help="Folders of manifests. Default: every kustomization under istio/")
        ] = None,
        as_json: AsJson = False,
    ) -> None:
        """Check manifests: our models, a cluster's schemas and rules where they are at hand, and across objects."""
        from services.mesh import checking  # with its schemas and rules, slow to load and used by nobody else
        from services.mesh.policy import crds

        settings = read(MeshSettings)
        try:
            definitions = crds.read(crds.folder(REPOSITORY))
        except crds.UnusableDefinitions as error:
            _fail(console, str(error))
        chosen = directories or checking.folders(settings.policy_dir.parent)
        registry = planned(settings, console)
        verdicts = [checking.check(folder, settings.policy_dir, registry, definitions) for folder in chosen]
        if as_json:
            print(json.dumps([_verdict(verdict) for verdict in verdicts], indent=1))
        else:
            for verdict in verdicts:
                for problem in verdict.problems:
                    _say(console, f"{problem.severity}: {problem}", "red" if problem.severity == "error" else "yellow")
                state = "ok" if verdict.is_good else "refused"
                _say(console, f"{verdict.folder}: {verdict.objects} objects, {state}", "green" if state == "ok" else "")
            if not definitions:
                looked = crds.folder(REPOSITORY)
                text = f"no CustomResourceDefinitions in {looked}: not checked against Istio's own (AUTOGLM_SCHEMAS)"
                _say(console, text, "yellow")
        raise typer.Exit(0 if all(verdict.is_good for verdict in verdicts) else 1)


def planned(settings: MeshSettings, console: Console) -> Registry:
    """The services of the topology, with the endpoints that it would start."""
    try:
        processes = topology.load(settings.topology, settings.replicas, settings.is_own_model)
        instances = topology.instances(processes, itertools.count(1))
        return topology.registry(processes, settings.namespace, settings.bind, instances)
    except TopologyError as error:
        _fail(console, str(error))
        raise AssertionError from None


def _verdict(verdict: Verdict) -> dict[str, Any]:
    problems = [
        {"file": p.file, "object": p.object, "path": p.path, "message": p.message, "severity": p.severity}
        for p in verdict.problems
    ]
    return {"folder": verdict.folder, "objects": verdict.objects, "ok": verdict.is_good, "problems": problems}


def _say(console: Console, text: str, style: str = "") -> None:
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _fail(console: Console, text: str, status: int = 1) -> None:
    _say(console, text, "red")
    raise typer.Exit(status)
