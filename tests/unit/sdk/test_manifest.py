"""The list of a model's files: one spelling, bounded, and no name that could leave its folder."""

from __future__ import annotations

import hashlib
import json

import pytest
from autoglm.manifest import FORMAT, MAX_MANIFEST_BYTES, BadManifest, ModelFile, make, parse

ONE = ModelFile("config.json", 2, "sha256:" + "a" * 64)
TWO = ModelFile("model-00001-of-00002.safetensors", 1 << 33, "sha256:" + "b" * 64)


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def test_a_manifest_comes_back_as_it_was_whatever_the_order() -> None:
    """The same files give the same bytes and the same digest."""
    made = make([TWO, ONE])
    assert made == make([ONE, TWO]) and made.digest == digest_of(made.encoded())
    assert parse(made.encoded(), made.digest) == made


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "/etc/passwd",
        "a\\b",
        ".hidden",
        "-rf",
        "a\0b",
        "a\nb",
        "x" * 201,
        "é.json",
        "con. ",
    ],
)
def test_a_name_can_only_be_a_files_own(name: str) -> None:
    """Nothing with a separator, hidden, unprintable or endless."""
    with pytest.raises(BadManifest, match="cannot be"):
        make([ModelFile(name, 1, ONE.digest)])


def written(**change: object) -> bytes:
    outer = {"files": [{"bytes": 2, "digest": ONE.digest, "name": "config.json"}], "format": FORMAT} | change
    return json.dumps(outer, sort_keys=True, separators=(",", ":")).encode()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x80not json", "not a list"),
        (b"[" * 100_000, "not a list"),
        (b"{}", "not a list"),
        (written(format="autoglm-model-2"), "format"),
        (written(files=[]), "0 files"),
        (written(files=[{"bytes": True, "digest": ONE.digest, "name": "a"}]), "not a list"),
        (written(files=[{"bytes": -1, "digest": ONE.digest, "name": "a"}]), "-1 bytes"),
        (written(files=[{"bytes": 1, "digest": "sha256:..", "name": "a"}]), "hexadecimal"),
        (written(files=[{"bytes": 1, "digest": ONE.digest, "name": name} for name in ("a", "A")]), "same name"),
        (written(extra=1), "spelled"),
        (written().replace(b":", b": ", 1), "spelled"),
        (bytes(MAX_MANIFEST_BYTES + 1), "at most"),
    ],
)
def test_what_is_no_manifest_is_refused(data: bytes, words: str) -> None:
    """In words, quickly, whatever the bytes are."""
    with pytest.raises(BadManifest, match=words):
        parse(data, digest_of(data))


def test_the_digest_must_be_that_of_the_bytes() -> None:
    """Neither another's bytes nor something that is no digest."""
    with pytest.raises(BadManifest, match="is not sha256"):
        parse(written(), "sha256:" + "0" * 64)
    with pytest.raises(BadManifest, match="hexadecimal"):
        parse(written(), "sha256:ABC")


def test_a_model_of_one_file_is_known_as_such() -> None:
    """A .gguf alone, but not one that lies beside a config.json."""
    gguf = ModelFile("tiny.gguf", 1, ONE.digest)
    assert make([gguf]).single_file == "tiny.gguf"
    assert make([gguf, ONE]).single_file is None and make([ONE, TWO]).single_file is None
