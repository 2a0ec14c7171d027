"""Packed weights on disk: made once, mapped afterwards, and never trusted more than other files."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engine.checkpoints.architecture import F32, Architecture, CheckpointError, RopeScaling, tensor_shape
from engine.checkpoints.packed import pack_or_open
from engine.precision.plan import PLANS

REPOSITORY = Path(__file__).resolve().parents[3]
ARCH = Architecture(
    family="llama", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, rotary_size=16, rotary_interleaved=False, rope_theta=10_000.0,
    rope_scaling=RopeScaling(), rms_norm_eps=1e-5, max_position_embeddings=64, activation="silu",
    activation_threshold=0.0, qkv_bias=False, o_bias=False, qk_norm=False, sandwich_norm=False,
    tie_word_embeddings=True, end_token_ids=(0,),
)  # fmt: skip


class Numbers:
    """A checkpoint whose weights are made up; one of them may be no number."""

    architecture = ARCH
    weight_files_digest = "sha256:made-up"

    def __init__(self, broken: str = "") -> None:
        self.reads, self._broken = 0, broken

    def tensor(self, name: str, layer: int | None = None) -> F32:
        self.reads += 1
        shape = tensor_shape(ARCH, name)
        values = np.random.default_rng(len(name) + (layer or 0)).standard_normal(shape).astype(np.float32)
        if name == self._broken:
            raise CheckpointError(f"layer {layer}: {name} holds a value that is no number")
        return values

    def rows(self, name: str, start: int, stop: int, layer: int | None = None) -> F32:
        return np.ascontiguousarray(self.tensor(name, layer)[start:stop])

    def close(self) -> None:
        pass


def packed(directory: Path, checkpoint: Numbers | None = None, *, resident: bool = False) -> bytes:
    """The packed weights' bytes, opened or made."""
    weights = pack_or_open(checkpoint or Numbers(), PLANS["int8"], directory, 1, lambda done, total: None, resident)
    return weights._memory.tobytes()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    """The file that packing made."""
    packed(tmp_path)
    (path,) = tmp_path.glob("*.packed")
    yield path


def test_the_second_time_nothing_is_read_from_the_checkpoint(tmp_path: Path) -> None:
    """The file is mapped, or copied into memory of one's own: the same bytes."""
    first = packed(tmp_path)
    again = Numbers()
    assert packed(tmp_path, again) == first == packed(tmp_path, again, resident=True)
    assert again.reads == 0


@pytest.mark.parametrize("size", [0, 10, 300, -1])
def test_a_file_cut_short_is_named_with_the_remedy(file: Path, size: int) -> None:
    """However much is missing: a typed error that says what to do; after that it works again."""
    whole = file.read_bytes()
    file.write_bytes(whole[:size])
    with pytest.raises(CheckpointError, match=r"\.packed: .*remove it, it will be made again"):
        packed(file.parent)
    file.unlink()
    packed(file.parent)
    assert file.read_bytes() == whole


@pytest.mark.parametrize("place", [0, 16, 20, 40])
def test_a_damaged_header_is_named_with_the_remedy(file: Path, place: int) -> None:
    """Magic, length, description: nothing of it is believed."""
    data = bytearray(file.read_bytes())
    data[place] ^= 0xFF
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="remove it"):
        packed(file.parent)


def test_a_weight_that_is_no_number_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    """The checkpoint's own error comes through, from a packing thread too, and no half file stays."""
    with pytest.raises(CheckpointError, match="down holds a value that is no number"):
        packed(tmp_path, Numbers(broken="down"))
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_what_a_killed_packer_left_is_removed(file: Path) -> None:
    """Its file was as large as the model; the next packer of the same model takes it away."""
    file.unlink()
    left = file.parent / f".{file.stem}.abcdef"
    left.write_bytes(b"half")
    packed(file.parent)
    assert not left.exists() and file.exists()


@pytest.mark.parametrize("how", ["a file in its place", "no permission"])
def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path, how: str) -> None:
    """A typed error with the path."""
    directory = tmp_path / "cache"
    if how == "no permission":
        if os.geteuid() == 0:
            pytest.skip("root may write everywhere")
        directory.mkdir(mode=0o500)
    else:
        directory.write_text("")
    with pytest.raises(CheckpointError, match="cache"):
        packed(directory)


def test_of_two_processes_one_packs_and_the_other_waits(tmp_path: Path) -> None:
    """The second finds the lock taken, tells that it waits, and maps what the first made."""
    code = (
        "import sys, pathlib\n"
        "from tests.unit.engine import test_packed as t\n"
        "class Slow(t.Numbers):\n"
        "    def tensor(self, name, layer=None):\n"
        "        if not self.reads:\n"
        "            print('packing', flush=True)\n"
        "            sys.stdin.readline()\n"
        "        return super().tensor(name, layer)\n"
        "numbers = Slow()\n"
        "told = lambda done, total: total == 0 and print('waiting', flush=True)\n"
        "t.pack_or_open(numbers, t.PLANS['int8'], pathlib.Path(sys.argv[1]), 1, told)\n"
        "print(numbers.reads, flush=True)\n"
    )
    processes = []
    try:
        for _ in range(2):
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", code, str(tmp_path)], cwd=REPOSITORY, text=True,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join((str(REPOSITORY), str(REPOSITORY / "sdk")))},
                )
            )  # fmt: skip
            heard = processes[-1].stdout.readline().strip()
            assert heard == ("packing" if len(processes) == 1 else "waiting")
        said = [process.communicate("\n", timeout=40)[0].split() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert int(said[0][-1]) > 0 and int(said[1][-1]) == 0
    assert len(list(tmp_path.glob("*.packed"))) == 1
