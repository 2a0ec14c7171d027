"""Damaged model files end in a typed error, or are models still; the long run is `make fuzz`."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from engine.checkpoints.architecture import CheckpointError
from engine.checkpoints.gguf_header import read_header
from engine.checkpoints.gguf_reader import open_gguf
from tests.fakes.checkpoint_fuzz import CORPUS, attempt, corpus, damaged

CASES = 150


@pytest.mark.parametrize("entry", corpus(), ids=lambda path: path.name)
def test_damaged_files_are_refused_or_read(entry: Path, tmp_path: Path) -> None:
    """Flipped bits, absurd numbers, cuts, repeats: nothing but CheckpointError ever comes out."""
    assert attempt(entry), "the undamaged file is a model"
    read = sum(attempt(damaged(entry, seed, tmp_path)) for seed in range(CASES))
    assert 0 < read < CASES, "damage is neither always noticed nor never"


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _file(
    tmp_path: Path, *keys: bytes, tensors: list[bytes] | None = None, data: bytes = bytes(256), version: int = 3
) -> Path:
    entries = tensors or []
    path = tmp_path / "x.gguf"
    head = b"GGUF" + struct.pack("<IQQ", version, len(entries), len(keys)) + b"".join(keys) + b"".join(entries)
    path.write_bytes(head + bytes(-len(head) % 32) + data)
    return path


def _tensor(name: bytes, sizes: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return _string(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


HUGE = 1 << 60
HOSTILE_KEYS = {
    "string-2^60": _string(b"k") + struct.pack("<IQ", 8, HUGE),
    "key-2^60": struct.pack("<Q", HUGE),
    "numbers-2^60": _string(b"k") + struct.pack("<IIQ", 9, 4, HUGE),
    "strings-2^60": _string(b"k") + struct.pack("<IIQ", 9, 8, HUGE),
    "strings-2^64": _string(b"k") + struct.pack("<IIQ", 9, 8, (1 << 64) - 1),
    "string-in-array-2^63": _string(b"k") + struct.pack("<IIQQ", 9, 8, 1, 1 << 63),
    "nested-array": _string(b"k") + struct.pack("<IIQIQ", 9, 9, 1, 4, 1),
    "unknown-type": _string(b"k") + struct.pack("<IQ", 99, 0),
    "not-utf-8": _string(b"\xff\xfe") + struct.pack("<II", 4, 1),
    "alignment-0": _string(b"general.alignment") + struct.pack("<II", 4, 0),
    "alignment-3": _string(b"general.alignment") + struct.pack("<II", 4, 3),
    "alignment-text": _string(b"general.alignment") + struct.pack("<I", 8) + _string(b"32"),
}
HOSTILE_TENSORS = {
    "product-overflows": [_tensor(b"t", [1 << 32, 1 << 32, 16])],
    "no-dimension": [_tensor(b"t", [])],
    "five-dimensions": [_tensor(b"t", [1] * 5)],
    "a-zero-dimension": [_tensor(b"t", [0, 4])],
    "beyond-the-file": [_tensor(b"t", [8], offset=1 << 40)],
    "offset-wraps": [_tensor(b"t", [8], offset=(1 << 64) - 32)],
    "unaligned": [_tensor(b"t", [8], offset=4)],
    "overlapping": [_tensor(b"t", [16]), _tensor(b"u", [16], offset=32)],
    "same-name": [_tensor(b"t", [8]), _tensor(b"t", [8], offset=32)],
    "unknown-type": [_tensor(b"t", [8], kind=77)],
    "broken-block": [_tensor(b"t", [33], kind=8)],
}


@pytest.mark.parametrize("name", HOSTILE_KEYS)
def test_hostile_metadata_is_refused(name: str, tmp_path: Path) -> None:
    """Before anything of the promised size is allocated."""
    with pytest.raises(CheckpointError):
        read_header(_file(tmp_path, HOSTILE_KEYS[name]))


@pytest.mark.parametrize("name", HOSTILE_TENSORS)
def test_hostile_tensor_entries_are_refused(name: str, tmp_path: Path) -> None:
    """Shapes, places and names that cannot be."""
    with pytest.raises(CheckpointError):
        read_header(_file(tmp_path, tensors=HOSTILE_TENSORS[name]))


def test_hostile_counts_and_other_files_are_refused(tmp_path: Path) -> None:
    """2^60 tensors or keys, other versions, big-endian files, other formats, pipes and nothing at all."""
    path = tmp_path / "x.gguf"
    for head in (
        struct.pack("<IQQ", 3, HUGE, 0), struct.pack("<IQQ", 3, 0, HUGE), struct.pack("<IQQ", 1, 0, 0),
        struct.pack(">IQQ", 3, 0, 0), b"", b"\x03",
    ):  # fmt: skip
        path.write_bytes(b"GGUF" + head)
        with pytest.raises(CheckpointError):
            read_header(path)
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        read_header(path)
    with pytest.raises(CheckpointError, match="no such file"):
        read_header(tmp_path / "absent.gguf")
    with pytest.raises(CheckpointError, match="regular"):
        read_header(Path("/dev/zero"))


def test_a_scale_that_is_not_a_number_is_refused(tmp_path: Path) -> None:
    """NaN in a block's scale: the tensor is named when it is read."""
    path = tmp_path / "x.gguf"
    data = bytearray((CORPUS / "llama-q8_0.gguf").read_bytes())
    stored = read_header(CORPUS / "llama-q8_0.gguf").tensors["blk.0.ffn_down.weight"]
    assert stored.kind == "Q8_0"
    data[stored.begin : stored.begin + 2] = b"\x00\x7e"
    path.write_bytes(data)
    checkpoint = open_gguf(path)
    with pytest.raises(CheckpointError, match=r"blk\.0\.ffn_down\.weight holds NaN"):
        checkpoint.tensor("down", 0)


def test_a_file_cut_short_after_it_was_opened_is_refused(tmp_path: Path) -> None:
    """An exception, not the end of the process."""
    path = tmp_path / "x.gguf"
    path.write_bytes((CORPUS / "glm-f32.gguf").read_bytes())
    checkpoint = open_gguf(path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 4)
    with pytest.raises(CheckpointError, match="cut short"):
        checkpoint.tensor("norm")
    checkpoint.close()
    with pytest.raises(CheckpointError):
        checkpoint.tensor("embedding")
