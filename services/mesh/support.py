"""docs/istio-support.md from the code: every field of every kind, translated or refused, and where it is tested.

    python -m services.mesh.support [--check]

The rows come from the policy models and their `istio_has` lists; where Istio's CustomResourceDefinitions are at hand, a
field that is in neither is an error, as is one that we translate and do not say into what.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml

from services.mesh.policy import crds
from services.mesh.policy.base import ISTIO_VERSION, Document, Strict
from services.mesh.policy.loading import KINDS
from services.mesh.policy.refusals import ISTIO_KINDS

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = REPOSITORY / "docs" / "istio-support.md"
TARGETS = Path(__file__).with_name("support.yaml")


@dataclass(frozen=True, slots=True)
class Row:
    """One field. `target` is what becomes of it; empty: refused."""

    path: str
    target: str

    @property
    def is_supported(self) -> bool:
        """Whether the local control plane takes it."""
        return bool(self.target)


def kinds() -> dict[str, type[Document]]:
    """All kinds that the control plane reads, in the order of their names."""
    return dict(sorted(KINDS.items()))


def rows(kind: str, model: type[Document], targets: Mapping[str, str]) -> list[Row]:
    """Every field below `spec`, deepest last, refused ones with their siblings."""
    spec = nested(model.model_fields["spec"].annotation)
    return list(_rows(spec, "", targets, kind)) if spec is not None else []


def nested(annotation: Any) -> type[Strict] | None:
    """The model inside an annotation, if there is one."""
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        return annotation
    return next((found for argument in get_args(annotation) if (found := nested(argument)) is not None), None)


def _rows(model: type[Strict], path: str, targets: Mapping[str, str], kind: str) -> Iterator[Row]:
    for name, field in model.model_fields.items():
        alias = field.alias or name
        here = f"{path}.{alias}" if path else alias
        inner = nested(field.annotation)
        listed = "[]" if _is_list(field.annotation) else ""
        branch = _said(f"{here}.*", targets, kind)
        if branch is not None:
            yield Row(f"{here}{listed}.*", branch)
            if inner is not None and not branch.startswith("the same"):  # whose refusals are told where it is the first
                yield from (row for row in _rows(inner, here + listed, targets, kind) if not row.target)
        elif inner is None:
            yield Row(here, _said(here, targets, kind) or UNSAID)
        else:
            yield from _rows(inner, here + listed, targets, kind)
    for name in sorted(model.istio_has):
        yield Row(f"{path}.{name}" if path else name, "")


def _is_list(annotation: Any) -> bool:
    if getattr(annotation, "__origin__", None) is tuple:
        return True
    return any(_is_list(argument) for argument in get_args(annotation))


def _said(path: str, targets: Mapping[str, str], kind: str) -> str | None:
    """The longest entry that the path ends with; one of this kind before one of any."""
    parts = path.replace("[]", "").split(".")
    for start in range(len(parts)):
        tail = ".".join(parts[start:])
        for key in (f"{kind}:{tail}", tail):
            if key in targets and tail != "*":
                return targets[key]
    return None


UNSAID = "?"
"""Stands for a supported field whose meaning nobody wrote down; `problems` reports it."""


def missing(kind: str, model: type[Document], definitions: crds.Definitions) -> list[str]:
    """Fields of Istio's definition that we neither support nor refuse by name."""
    version = get_args(model.model_fields["api_version"].annotation)[0]
    schema = definitions[(version, kind)]["properties"]["spec"]
    spec = nested(model.model_fields["spec"].annotation)
    return list(_missing(spec, schema, "spec")) if spec is not None else []


def _missing(model: type[Strict], schema: Mapping[str, Any], path: str) -> Iterator[str]:
    fields = {field.alias or name: field for name, field in model.model_fields.items()}
    for name, inner in schema.get("properties", {}).items():
        if name not in fields:
            if name not in model.istio_has:
                yield f"{path}.{name}"
            continue
        deeper = nested(fields[name].annotation)
        if deeper is None or inner.get("x-kubernetes-preserve-unknown-fields"):
            continue
        inner = inner.get("items", inner)
        extra = inner.get("additionalProperties")
        yield from _missing(deeper, extra if isinstance(extra, dict) else inner, f"{path}.{name}")


def targets() -> dict[str, str]:
    """What becomes of each field, from support.yaml."""
    loaded = yaml.safe_load(TARGETS.read_text("utf-8"))
    return {str(key): str(value) for key, value in loaded.items()}


def problems(definitions: crds.Definitions) -> list[str]:
    """What keeps the page from being true."""
    said = targets()
    found = [
        f"{kind}.spec.{row.path}: support.yaml does not say what becomes of it"
        for kind, model in kinds().items()
        for row in rows(kind, model, said)
        if row.target == UNSAID
    ]
    if definitions:
        for kind, model in kinds().items():
            found += [f"{kind}.{path}: neither supported nor refused" for path in missing(kind, model, definitions)]
    return found


def page() -> str:
    """The whole document."""
    said = targets()
    lines = [
        "# What the local control plane makes of Istio",
        "",
        "Generated from the models by `python -m services.mesh.support`; a test keeps it current. "
        f"Istio {ISTIO_VERSION}.",
        "A field is either translated, to what the table says, or refused with its path; nothing is ignored. Defaults",
        "are Istio's, pinned in `tests/unit/mesh_policy/test_defaults.py`. Each field stands in the sample",
        "`tests/unit/mesh_policy/everything/policy.yaml`, and a real Envoy takes what comes of it",
        "(`tests/mesh/test_translation_on_envoy.py`).",
        "",
        f"Kinds that are refused as a whole: {', '.join(sorted(ISTIO_KINDS - KINDS.keys()))},",
        "and the Gateway API's: `istio/gateway-api` is for clusters; `python -m services.mesh check` checks it.",
    ]
    for kind, model in kinds().items():
        found = rows(kind, model, said)
        taken, refused = [row for row in found if row.is_supported], [row for row in found if not row.is_supported]
        version = get_args(model.model_fields["api_version"].annotation)[0]
        lines += ["", f"## {kind}", "", f"`{version}`: {len(taken)} fields translated, {len(refused)} refused.", ""]
        lines += ["| field | becomes |", "| --- | --- |"]
        lines += ["| `{}` | {} |".format(row.path, row.target.replace("|", r"\|")) for row in taken]
        if refused:
            lines += ["", "Refused: " + ", ".join(f"`{row.path}`" for row in refused) + "."]
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    """Writes the page, or says with `--check` whether it is current."""
    found = problems(crds.read(crds.folder(REPOSITORY)))
    for problem in found:
        print(problem, file=sys.stderr)
    if "--check" in arguments:
        is_current = PAGE.exists() and PAGE.read_text("utf-8") == page()
        print("current" if is_current else f"{PAGE} is not current: run python -m services.mesh.support")
        return 0 if is_current and not found else 1
    PAGE.write_text(page(), "utf-8")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
