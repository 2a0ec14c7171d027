"""Damages small valid model files in many ways and opens them. Used by the fault test and by the long fuzz run.

A case is (file of the corpus, seed): the same damage every time. Opening must end in success or in a typed error.
"""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path

from engine.checkpoints.architecture import Checkpoint, CheckpointError, present_tensors
from engine.checkpoints.gguf_tokenizer import metadata_digest
from engine.checkpoints.opening import open_checkpoint
from services.tokenizer.vocabulary import UnusableTokenizer, load

CORPUS = Path(__file__).parent.parent / "faults" / "corpus"
NUMBERS = (
    0, 1, 2, 3, 7, 31, 32, 33, 255, 256, 1 << 15, 1 << 20, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 60, (1 << 63) - 1,
    1 << 63, (1 << 64) - 1, (1 << 64) - 32,
)  # fmt: skip
FLOATS = (b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f", b"\x00\x7e", b"\x00\x7c", b"\x00\xfc")
ALPHABET = '0123456789{}[],:"-eE.ntf\\u '


def corpus() -> list[Path]:
    """GGUF files, and directories with config.json and model.safetensors."""
    return sorted(path for path in CORPUS.iterdir() if path.suffix == ".gguf" or path.is_dir())


def damaged(path: Path, seed: int, into: Path) -> Path:
    """Writes a damaged copy of a corpus entry below `into`; its path."""
    rng = random.Random(f"{path.name} {seed}")
    if path.is_dir():
        target = into / "model"
        target.mkdir(exist_ok=True)
        victim = rng.choice(["config.json", "model.safetensors", "model.safetensors"])
        for file in path.iterdir():
            data = file.read_bytes()
            if file.name == victim:
                data = _damage_json(rng, data) if victim == "config.json" else _damage_safetensors(rng, data)
            (target / file.name).write_bytes(data)
        return target
    target = into / "model.gguf"
    target.write_bytes(_damage(rng, path.read_bytes(), rng.choice([64, 1024, 4096, 1 << 30])))
    return target


def attempt(path: Path) -> bool:
    """Opens and reads everything. True when it was a model, False when it was refused; anything else is raised."""
    is_model = True
    try:
        with contextlib.closing(open_checkpoint(path, max_bytes=1 << 24)) as checkpoint:
            _read_all(checkpoint)
    except CheckpointError:
        is_model = False
    if path.suffix == ".gguf":
        try:
            metadata_digest(path)
            load(path, 1 << 24)
        except (CheckpointError, UnusableTokenizer):
            is_model = False
    return is_model


def _read_all(checkpoint: Checkpoint) -> None:
    arch = checkpoint.architecture
    checkpoint.rows("embedding", 0, min(4, arch.vocab_size))
    checkpoint.tensor("norm")
    for layer in range(arch.num_hidden_layers):
        for name in present_tensors(arch):
            checkpoint.tensor(name, layer)


def _damage(rng: random.Random, data: bytes, window: int) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        if not out:
            break
        at = rng.randrange(min(len(out), window))
        match rng.randrange(8):
            case 0:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at] = rng.randrange(256)
            case 2 | 3:
                size = rng.choice([1, 2, 4, 8, 8])
                out[at : at + size] = (rng.choice(NUMBERS) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
            case 4:
                del out[at:]
            case 5:
                del out[at : at + rng.choice([1, 4, 8, 100])]
            case 6:
                start = rng.randrange(len(out))
                out[at:at] = out[start : start + rng.choice([1, 4, 8, 32, 1000])]
            case _:
                piece = rng.choice(FLOATS)
                out[at : at + len(piece)] = piece
    return bytes(out)


def _damage_json(rng: random.Random, data: bytes) -> bytes:
    text = data.decode()
    if rng.random() < 0.5:
        value = json.loads(text)
        value[rng.choice(sorted(value))] = rng.choice(
            [*NUMBERS, -1, 0.5, 1e308, None, "", "x", [], {}, True, [[]], "yarn"]
        )
        return json.dumps(value).encode()
    at = rng.randrange(len(text))
    if rng.random() < 0.1:
        return (text[:at] + "[" * 100_000 + text[at:]).encode()
    return (text[:at] + "".join(rng.choices(ALPHABET, k=rng.randrange(4))) + text[at + rng.randrange(3) :]).encode()


def _damage_safetensors(rng: random.Random, data: bytes) -> bytes:
    """Half of the time the length before the header stays right, so that damage gets past it."""
    if rng.random() < 0.5:
        return _damage(rng, data, rng.choice([8, 2048, 1 << 30]))
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].decode()
    numbers = [at for at, letter in enumerate(header) if letter.isdigit()]
    at = rng.choice(numbers) if rng.random() < 0.7 else rng.randrange(len(header))
    changed = header[:at] + rng.choice([*map(str, NUMBERS), "-1", "1e9", "0.5", "null", "", '"'])
    encoded = (changed + header[at + rng.randrange(3) :]).encode()
    return len(encoded).to_bytes(8, "little") + encoded + data[8 + length :]
