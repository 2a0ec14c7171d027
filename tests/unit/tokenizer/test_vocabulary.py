"""The vocabulary: special tokens only where asked for, files from strangers refused, digests that mean something."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.checkpoints.digests import tokenizer_digest
from services.chassis.decoding import unknown_id
from services.tokenizer import vocabulary
from services.tokenizer.settings import parse_models

MODEL = Path("models/glm-tiny")
GLM = vocabulary.load(MODEL, 1 << 26)
CONTROLS = [token.text for token in GLM.controls.values()]
CONTROL_IDS = {token.token_id for token in GLM.controls.values()}


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.sampled_from([*CONTROLS, "<|", "|>", "user"]), st.text(max_size=5)), max_size=12))
def test_plain_encoding_never_makes_a_control_id(parts: list[str]) -> None:
    """However special tokens are written into text, plain encoding spells them out."""
    assert not CONTROL_IDS & set(GLM.encode("".join(parts)))


def test_special_tokens_are_parsed_and_added_only_on_request() -> None:
    """The two switches do what their names say, independently."""
    user = GLM.controls["<|user|>"].token_id
    assert GLM.encode("<|user|>", parse_special=True) == [user]
    assert user not in GLM.encode("<|user|>")
    prefix = [GLM.controls[text].token_id for text in ("[gMASK]", "<sop>")]
    assert GLM.encode("x", add_special=True) == [*prefix, *GLM.encode("x")]


def test_tokens_not_flagged_special_are_control_tokens_too(tmp_path: Path) -> None:
    """`<think>` is often flagged special: false; written by a caller it is text all the same. White space stays."""
    source = json.loads((MODEL / "tokenizer.json").read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    source["added_tokens"] += [{"id": 4096, "content": "<think>", **flags}, {"id": 4097, "content": "\t\t\t", **flags}]
    (tmp_path / "tokenizer.json").write_text(json.dumps(source))
    loaded = vocabulary.load(tmp_path, 1 << 26)
    assert 4096 in loaded.encode("<think>", parse_special=True)
    assert 4096 not in loaded.encode("a<think>b")
    assert 4097 in loaded.encode("\t\t\t")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": {}}', "null", '{"version": "1.0"}', "\xff"])
def test_broken_files_are_refused(tmp_path: Path, content: str) -> None:
    """A malformed tokenizer.json gives one clear error."""
    (tmp_path / "tokenizer.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(vocabulary.UnusableTokenizer, match=r"tokenizer\.json"):
        vocabulary.load(tmp_path, 1 << 26)


def test_oversize_files_are_refused_before_they_are_read() -> None:
    """The limit on file size is checked first."""
    with pytest.raises(vocabulary.UnusableTokenizer, match="at most 1000"):
        vocabulary.load(MODEL, 1000)


def test_unknown_ids_are_found() -> None:
    """The first id outside the vocabulary is named; all others pass."""
    assert unknown_id(GLM, range(GLM.size)) is None
    assert unknown_id(GLM, [1, GLM.size, GLM.size + 7]) == GLM.size


def test_digest_covers_every_text_file_and_nothing_else(tmp_path: Path) -> None:
    """One changed byte in any of them changes the digest; other files do not; moving bytes between files does."""
    for name in ("tokenizer.json", "chat_template.jinja", "tokenizer_config.json"):
        shutil.copy(MODEL / name, tmp_path / name)
    first = tokenizer_digest(tmp_path)
    assert first == tokenizer_digest(MODEL) == GLM.digest
    (tmp_path / "config.json").write_text("{}")
    assert tokenizer_digest(tmp_path) == first
    for name in ("tokenizer.json", "chat_template.jinja", "tokenizer_config.json", "special_tokens_map.json"):
        path = tmp_path / name
        before = path.read_bytes() if path.exists() else None
        path.write_bytes((before or b"") + b" ")
        assert tokenizer_digest(tmp_path) != first
        path.unlink() if before is None else path.write_bytes(before)
    assert tokenizer_digest(tmp_path) == first


def test_digest_is_computed_as_documented(tmp_path: Path) -> None:
    """Name, zero byte, size, bytes: a second implementation from the docstring agrees."""
    (tmp_path / "tokenizer.json").write_bytes(b"abc")
    data = b"autoglm-tokenizer-v1\0" + b"tokenizer.json\0" + (3).to_bytes(8, "little") + b"abc"
    assert tokenizer_digest(tmp_path) == "sha256:" + hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("value", ["", "a", "a=", "=b", "a=b,", "a=b,a=c", "x" * 129 + "=b"])
def test_bad_model_lists_are_refused(value: str) -> None:
    """Every malformed pair is a start-up error, not a surprise."""
    with pytest.raises(ValueError):
        parse_models(value)
