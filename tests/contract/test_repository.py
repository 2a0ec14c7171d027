"""Promises about the source itself."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FORBIDDEN_MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "yaml.load", "numpy.load", "np.load", "os.system"}


def tracked(*patterns: str) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).exists()]


PYTHON = [path for path in tracked("*.py") if "_pb2" not in path.name]

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *tracked("docs/*.md", "docs/**/*.md")]


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_no_file_can_run_what_it_reads() -> None:
    """No pickle, eval, exec, unsafe yaml or numpy loading anywhere in the product."""
    found = []
    for path in PYTHON:
        if "tests" in path.parts:
            continue
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [f"{path}: import {name}" for name in names if name.split(".")[0] in FORBIDDEN_MODULES]
        for name, call in calls(tree):
            safe = any(k.arg == "allow_pickle" and ast.unparse(k.value) == "False" for k in call.keywords)
            if name in FORBIDDEN_CALLS and not safe:
                found.append(f"{path}:{call.lineno}: {name}")
    assert found == []


def test_tests_never_sleep_for_a_fixed_time() -> None:
    """A test waits for an event. A short pause is allowed only inside a `while` that looks for one."""
    found = []
    for path in PYTHON:
        if not path.name.startswith("test_"):
            continue
        tree = ast.parse(path.read_text())
        polling = {id(call) for node in ast.walk(tree) if isinstance(node, ast.While) for _, call in calls(node)}
        for name, call in calls(tree):
            if name.split(".")[-1] == "sleep" and ast.unparse(call.args[0]) != "0" and id(call) not in polling:
                found.append(f"{path.relative_to(ROOT)}:{call.lineno}")
    assert found == []


def test_every_test_states_its_promise() -> None:
    """Each test function has a docstring."""
    missing = []
    for path in tracked("tests/**/test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                if ast.get_docstring(node) is None:
                    missing.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert missing == []


def test_the_readme_names_only_targets_that_exist() -> None:
    """`make something` in the documentation is in the Makefile."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in DOCUMENTS:
        named = set(re.findall(r"(?:`|    )make ([a-z-]+)", path.read_text()))
        assert named <= targets, f"{path}: {named - targets}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    """Relative links in the documentation point at files that exist."""
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_only_the_edge_aborts_calls() -> None:
    """`context.abort` is called in one place, the chassis's interceptor."""
    found = [
        str(path.relative_to(ROOT))
        for path in PYTHON
        if "tests" not in path.parts
        for name, _ in calls(ast.parse(path.read_text()))
        if name.endswith("context.abort")
    ]
    assert set(found) <= {"services/chassis/interceptors.py"}
