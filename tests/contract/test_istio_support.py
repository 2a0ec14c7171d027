"""docs/istio-support.md is what the code says, and the code has a word for every field."""

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.mesh import support
from services.mesh.policy import crds

ROOT = Path(__file__).resolve().parents[2]
NEEDS_CERTIFICATES = {"DestinationRule: trafficPolicy.tls.sni", "DestinationRule: trafficPolicy.tls.subjectAltNames"}
"""Not in the sample, whose Envoy has none: pinned in test_defaults.py, tried in tests/mesh with mutual TLS."""
SAMPLE = ROOT / "tests" / "unit" / "mesh_policy" / "everything" / "policy.yaml"


def test_the_page_is_what_the_models_say() -> None:
    """Run `python -m services.mesh.support` after a change of the models."""
    assert support.PAGE.read_text() == support.page()


def test_every_supported_field_says_what_becomes_of_it() -> None:
    """No field is taken without a word about its meaning."""
    assert support.problems({}) == []


def test_every_field_of_istio_is_either_translated_or_refused_by_name() -> None:
    """Completeness against the CustomResourceDefinitions: a field that is in neither set fails here."""
    definitions = crds.read(crds.folder(ROOT))
    if not definitions:
        missing = f"no CustomResourceDefinitions in {crds.folder(ROOT)}: completeness is NOT checked (AUTOGLM_SCHEMAS)"
        warnings.warn(missing, stacklevel=1)
        pytest.skip(missing)
    assert support.problems(definitions) == []


def _used(value: Any, path: str) -> Iterator[str]:
    """Every path below a spec; one of a subset or a port counts for the rule, too, whose fields it has."""
    if path:
        yield path
        yield re.sub(r"^(subsets[.])?trafficPolicy([.]portLevelSettings)?(?=[.]|$)", "trafficPolicy", path)
        yield path.removeprefix("subsets.")
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield from _used(inner, f"{path}.{key}" if path else key)
    for item in value if isinstance(value, list) else ():
        yield from _used(item, path)


def test_every_translated_field_stands_in_the_sample_that_envoy_takes() -> None:
    """So "translated" means that a real Envoy was given it (tests/mesh/test_translation_on_envoy.py)."""
    used: dict[str, set[str]] = {}
    for document in yaml.safe_load_all(SAMPLE.read_text()):
        used.setdefault(document["kind"], set()).update(_used(document["spec"], ""))
    missing = [
        f"{kind}: {row.path}"
        for kind, model in support.kinds().items()
        for row in support.rows(kind, model, support.targets())
        if row.is_supported and row.path.replace("[]", "").removesuffix(".*") not in used.get(kind, set())
    ]
    assert set(missing) <= NEEDS_CERTIFICATES


def test_a_field_without_a_word_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check can fail: take one word away, and its field is named."""
    words = support.targets()
    del words["VirtualService:http.timeout"]
    monkeypatch.setattr(support, "targets", lambda: words)
    assert support.problems({}) == ["VirtualService.spec.http[].timeout: support.yaml does not say what becomes of it"]
