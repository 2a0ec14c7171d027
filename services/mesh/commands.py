"""The commands about policy: `check`, `diff` and `explain`. Nothing here changes anything."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from services.chassis.settings import read
from services.mesh import inputs, policy, state, topology, views
from services.mesh.differences import at_risk, differences
from services.mesh.envoy import Admin
from services.mesh.explain import CannotExplain, NoToken, Request, claims_of, issuers
from services.mesh.explain import explain as explain_request
from services.mesh.explain.request import OUTSIDE
from services.mesh.inputs import Inputs
from services.mesh.keys import keys_for
from services.mesh.policy import Policy, PolicyError
from services.mesh.rundir import RunDirectory
from services.mesh.settings import MeshSettings
from services.mesh.topology import TopologyError
from services.mesh.translate import NodeSettings, Snapshot, translate

if TYPE_CHECKING:
    from services.mesh.checking import Verdict

IMAGINED_PORT = 20_000
"""Ports of a mesh that does not run are counted from here."""
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
        registry = planned(settings, console).registry
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

    @app.command()
    def diff(
        directory: Annotated[Path | None, typer.Argument(help="The edited policy. Default: istio/base")] = None,
        against: Annotated[Path | None, typer.Option(help="Another folder instead of the running mesh.")] = None,
        as_json: AsJson = False,
    ) -> None:
        """What an edit would change in Envoy, before it is applied. Exit status 1 when it would be refused."""
        settings = read(MeshSettings)
        edited = directory or settings.policy_dir
        running = _running(settings)
        if running is None and against is None:
            _fail(console, "no mesh is running to compare with; start one, or name a folder: --against istio/base", 3)
        around = running or planned(settings, console)
        if against is not None:
            old = _translated(against, around, settings, console)[1]
        else:
            old = _in_force(around, console)
        loaded, new = _translated(edited, around, settings, console)
        changes = differences(old, new)
        streams = _streams(settings, at_risk(changes)) if running is not None and against is None else {}
        if as_json:
            print(json.dumps({"changes": [asdict(change) for change in changes], "streams_at_risk": streams}, indent=1))
            return
        for problem in policy.check(loaded, around.registry):
            _say(console, f"{problem.severity}: {problem}", "yellow")
        views.show_changes(changes, streams, console)

    @app.command()
    def explain(
        path: Annotated[
            str, typer.Argument(help="Such as /v1/completions or /package.Service/Method; may have a query.")
        ],
        host: Annotated[str, typer.Option(help="Whom the request names; default: by the gRPC service's package.")] = "",
        header: Annotated[list[str] | None, typer.Option(help="name:value; may be repeated.")] = None,
        caller: Annotated[str, typer.Option("--from", help="outside, or the service that calls.")] = OUTSIDE,
        method: Annotated[str, typer.Option(help="HTTP method; default: POST for gRPC, else GET.")] = "",
        token: Annotated[str, typer.Option(help="The token it brings; read, not verified.")] = "",
        claim: Annotated[
            list[str] | None, typer.Option(help="name=value of an imagined token; may be repeated.")
        ] = None,
        directory: Annotated[
            Path | None, typer.Option("--policy", help="Another folder than the running mesh's (or istio/base).")
        ] = None,
        as_json: AsJson = False,
    ) -> None:
        """Which route, cluster, endpoints and rules a request would meet, and which YAML decides each of them."""
        settings = read(MeshSettings)
        around = _running(settings) or planned(settings, console)
        loaded, snapshot = _translated(directory or around.policy_dir, around, settings, console)
        is_grpc = re.fullmatch(r"/[\w.]+\.\w+/\w+", path) is not None
        authority = host or ("localhost" if caller == OUTSIDE else _service_of(path))
        if not path.startswith("/") or not authority:
            _fail(console, "a path begins with a slash, and --host says which service it is for", 2)
        pairs = [text.partition(":") for text in header or []]
        if any(not name or not colon for name, colon, _ in pairs):
            _fail(console, "a header is written name:value", 2)
        request = Request(
            path,
            authority,
            caller,
            method or ("POST" if is_grpc else "GET"),
            {name.strip().lower(): value.strip() for name, _, value in pairs},
            _claims(token, claim or [], snapshot, console),
        )
        try:
            story = explain_request(snapshot, loaded, around.registry, request)
        except CannotExplain as error:
            _fail(console, str(error))
        if as_json:
            print(json.dumps(asdict(story), indent=1))
        else:
            views.show_story(request, story, console)
        is_refused = story.door is not None and story.door.verdict == "denied"
        raise typer.Exit(1 if is_refused or story.action == "nothing" else 0)


def _claims(token: str, claims: list[str], snapshot: Snapshot, console: Console) -> dict[str, Any] | None:
    """What the token says, or an imagined one; of claims given twice a list. None: there is no token."""
    try:
        found = claims_of(token) if token else {}
    except NoToken as error:
        _fail(console, str(error), 2)
    if claims and not token:
        found = dict(iss=next(iter(issuers(snapshot)), ""), sub="somebody")
    given: dict[str, list[str]] = {}
    for text in claims:
        name, equals, value = text.partition("=")
        if not name or not equals:
            _fail(console, "a claim is written name=value", 2)
        given.setdefault(name, []).append(value)
    found |= {name: values[0] if len(values) == 1 else values for name, values in given.items()}
    return found if token or claims else None


def planned(settings: MeshSettings, console: Console) -> Inputs:
    """The mesh as the topology would start it: every process, its sidecar, and who calls whom."""
    try:
        processes = topology.load(settings.topology, settings.replicas, settings.is_own_model)
    except TopologyError as error:
        _fail(console, str(error))
    supply = itertools.count(IMAGINED_PORT)
    found = topology.instances(processes, supply)
    directory = RunDirectory(settings.run_dir)
    node = NodeSettings(
        directory.envoy,
        listen_address=settings.bind,
        callers=topology.callers(processes, supply),
        sidecars=topology.sidecars(processes, settings.namespace, found),
        identities=directory.identity,
        namespace=settings.namespace,
        locality=settings.locality,
    )
    registry = topology.registry(processes, settings.namespace, settings.bind, found)
    return Inputs(node, registry, settings.policy_dir)


def _running(settings: MeshSettings) -> Inputs | None:
    """What the mesh that runs translates from; None when none runs."""
    directory = RunDirectory(settings.run_dir)
    try:
        return inputs.read(directory.envoy) if directory.holder() is not None else None
    except OSError:
        return None


def _in_force(around: Inputs, console: Console) -> Snapshot:
    try:
        return Snapshot.read(around.node.run_directory)
    except (OSError, ValueError, KeyError) as error:
        _fail(console, f"the running mesh's configuration cannot be read: {error}")


def _translated(directory: Path, around: Inputs, settings: MeshSettings, console: Console) -> tuple[Policy, Snapshot]:
    try:
        keys = keys_for(settings.issuer_dir or RunDirectory(settings.run_dir).issuer)
        loaded = asyncio.run(keys.filled(policy.load(directory)))
        return loaded, translate(loaded, around.registry, around.node)
    except PolicyError as error:
        for problem in error.problems:
            _say(console, f"error: {problem}", "red")
        _fail(console, f"{directory} would be refused, and the old policy would stay")


def _streams(settings: MeshSettings, listeners: tuple[str, ...]) -> dict[str, int]:
    """Requests under way on each of these listeners, as Envoy counts them now."""
    current = state.read(RunDirectory(settings.run_dir).state)
    if current is None or not listeners:
        return {}
    host, _, port = current.addresses.admin.rpartition(":")
    try:
        found = asyncio.run(Admin(host, int(port)).counters(r"^http\..*downstream_rq_active$"))
    except OSError:
        return {}
    return {name: found.get(f"http.{name}.downstream_rq_active", 0) for name in listeners}


def _service_of(path: str) -> str:
    """`/autoglm.sparse_inference.v1.X/Y` is spoken by the service sparse-inference."""
    found = re.match(r"/autoglm\.([a-z_]+)\.v\d+\.", path)
    return found[1].replace("_", "-") if found is not None else ""


def _verdict(verdict: Verdict) -> dict[str, Any]:
    problems = [
        {"file": p.file, "object": p.object, "path": p.path, "message": p.message, "severity": p.severity}
        for p in verdict.problems
    ]
    return {"folder": verdict.folder, "objects": verdict.objects, "ok": verdict.is_good, "problems": problems}


def _say(console: Console, text: str, style: str = "") -> None:
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _fail(console: Console, text: str, status: int = 1) -> NoReturn:
    _say(console, text, "red")
    raise typer.Exit(status)
