"""The training text: what is kept, what is dropped and why, and which side of the split it lands on."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.trainer.pretrain.corpus import Document, exchanges, load, near_duplicates


def _code(name: str, count: int = 40) -> str:
    """A file long enough to be kept, and sharing no 5-gram of words with one of another name."""
    return "\n".join(f"{name}_{i} = {name}_call_{i}({name}_argument_{i})" for i in range(count)) + "\n"


def _tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_a_near_duplicate_points_to_the_earlier_text() -> None:
    """A text with one word changed is a twin of the first; an unrelated one is not."""
    original = _code("alpha", 100)
    changed = original.replace("alpha_50 = ", "renamed = ")
    assert near_duplicates([original, _code("beta", 100), changed]) == {2: 0}


def test_half_shared_text_is_not_a_near_duplicate() -> None:
    """Files that share half of their text stay: only a similarity of 0.8 and more drops one."""
    shared = _code("alpha", 50)
    assert near_duplicates([shared + _code("beta", 50), shared + _code("gamma", 50)]) == {}


def test_a_twin_of_held_out_text_is_dropped_from_the_training_side(tmp_path: Path) -> None:
    """Of a near-duplicate pair across the split the held-out copy survives, so nothing measured was trained on."""
    text = _code("alpha")
    corpus = load(_tree(tmp_path, {"aaa.py": text, "json/decoder.py": text, "other.py": _code("beta")}))
    assert [d.path for d in corpus.held_out] == ["json/decoder.py"]
    assert [d.path for d in corpus.train] == ["other.py"]
    assert corpus.dropped == {"aaa.py": "near-duplicate of json/decoder.py"}


@pytest.mark.parametrize(
    "path", ["test/test_json/test_dump.py", "test/test_csv.py", "test/test_http_cookies.py", "test/test_zipfile64.py"]
)
def test_tests_of_held_out_packages_are_on_neither_side(tmp_path: Path, path: str) -> None:
    """A held-out package's tests would teach its interface: they are dropped by name, with the reason on record."""
    corpus = load(_tree(tmp_path, {path: _code("alpha"), "test/test_bisect.py": _code("beta")}))
    assert [d.path for d in corpus.train] == ["test/test_bisect.py"]
    assert corpus.held_out == ()
    assert corpus.dropped == {path: "test of a held-out package"}


def test_the_split_is_by_package_and_never_inside_one(tmp_path: Path) -> None:
    """Every module of a held-out package is held out, however deep; others of similar name are not."""
    files = {
        "logging/__init__.py": _code("a"),
        "logging/deep/handlers.py": _code("b"),
        "jsonish.py": _code("c"),
        "email/json.py": _code("d"),
    }
    corpus = load(_tree(tmp_path, files))
    assert {d.path for d in corpus.held_out} == {"logging/__init__.py", "logging/deep/handlers.py"}
    assert {d.path for d in corpus.train} == {"jsonish.py", "email/json.py"}


def test_licence_headers_go_and_other_comments_stay(tmp_path: Path) -> None:
    """Only a leading comment block that is a notice is removed; docstrings and plain comments are text to learn."""
    notice = "# Copyright (C) 2001 Somebody\n# Licensed to everybody\n\n"
    files = {
        "noticed.py": notice + _code("a"),
        "shebang.py": "#!/usr/bin/env python\n" + notice + _code("b"),
        "plain.py": "# How this works: slowly.\n" + _code("c"),
        "later.py": _code("d") + "# copyright is discussed here\n",
    }
    texts = {d.path: d.text for d in load(_tree(tmp_path, files)).train}
    assert texts["noticed.py"] == _code("a")
    assert texts["shebang.py"] == _code("b")
    assert texts["plain.py"] == files["plain.py"]
    assert texts["later.py"] == files["later.py"]


def test_what_is_no_text_is_dropped_with_its_reason(tmp_path: Path) -> None:
    """Tables, stubs, oversized and undecodable files are recorded, never silently skipped."""
    files = {
        "stub.py": "x = 1\n",
        "numbers.py": "data = [" + ", ".join(str(10**6 + i) for i in range(200)) + "]\n",
        "table.py": "letters = '" + "äöüß" * 100 + "'\n",
        "large.py": _code("a", 12_000),
    }
    root = _tree(tmp_path, files)
    (root / "latin.py").write_bytes(b"name = '\xe4'\n" * 20)
    corpus = load(root)
    assert corpus.train == ()
    assert corpus.dropped == {
        "stub.py": "shorter than 64 characters",
        "numbers.py": "mostly numbers",
        "table.py": "mostly a character table",
        "large.py": "larger than 400000 bytes",
        "latin.py": "not UTF-8",
    }


def test_the_manifest_names_every_file_once(tmp_path: Path) -> None:
    """The published list gives each file's side and hash, or why it was dropped."""
    corpus = load(_tree(tmp_path, {"csv.py": _code("a"), "bisect.py": _code("b"), "tiny.py": "pass\n"}))
    manifest = corpus.manifest()
    assert manifest["train"] == {"bisect.py": corpus.train[0].sha256}
    assert manifest["held_out"] == {"csv.py": corpus.held_out[0].sha256}
    assert manifest["dropped"] == {"tiny.py": "shorter than 64 characters"}


SOURCE = '''\
class Stack:
    def pop_many(self, count):
        """Remove and return `count` items,
        newest first.

        Raises IndexError when there are fewer.
        """
        return [self.items.pop() for _ in range(count)]

    def undocumented(self):
        return [self.items.pop() for _ in range(1)] + [self.items.pop() for _ in range(2)]

def brief():
    """Too short."""
    return [item for item in range(100) if item % 2 == 0 and item % 3 == 0]
'''


def test_an_exchange_is_a_documented_function_and_its_source() -> None:
    """The summary paragraph asks; the dedented source answers and is valid Python by itself."""
    (pair,) = exchanges(Document("stack.py", "stack", SOURCE))
    assert pair.request == "Write a Python function `pop_many`. Remove and return `count` items, newest first."
    assert pair.answer.startswith('def pop_many(self, count):\n    """Remove')
    compile(pair.answer, "answer", "exec")


def test_a_file_that_does_not_parse_gives_no_exchanges() -> None:
    """Python 2 leftovers and broken test data are text to learn, not answers to give."""
    assert list(exchanges(Document("old.py", "old", "print 'hello'\n"))) == []
