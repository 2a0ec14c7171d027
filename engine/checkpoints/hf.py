"""A model directory in the Hugging Face layout, opened as a `Checkpoint`.

Weights are `model.safetensors`, or shards that `model.safetensors.index.json` lists. All shapes are checked against the
configuration when the directory is opened; tensors are read when they are asked for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from engine.checkpoints.architecture import (
    F32,
    GLOBAL_TENSORS,
    LAYER_TENSORS,
    Architecture,
    CheckpointError,
    present_tensors,
    tensor_shape,
)
from engine.checkpoints.digest_cache import DigestCache, WeightsDigest
from engine.checkpoints.hf_config import read_architecture
from engine.checkpoints.json_files import read_object
from engine.checkpoints.safetensors_file import DTYPES, SafetensorsFile

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_INDEX_BYTES = 16 << 20
MAX_SHARDS = 256
"""Each is an open file."""

_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}\.safetensors")
_GLOBAL_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
}
_LAYER_NAMES = {
    "input_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "o": "self_attn.o_proj.weight",
    "o_bias": "self_attn.o_proj.bias",
    "post_attention_norm": "post_self_attn_layernorm.weight",
    "post_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
    "post_mlp_norm": "post_mlp_layernorm.weight",
}
_FUSED = ("glm", "glm4")
"""Families that keep gate and up, in that order, as one matrix."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Rows `first` to `first + rows` of a stored tensor."""

    name: str
    first: int
    rows: int


class HfCheckpoint:
    """Implements `engine.checkpoints.architecture.Checkpoint`."""

    def __init__(self, directory: Path, max_bytes: int, digests: DigestCache) -> None:
        """Raises CheckpointError, also when the weight files have more than `max_bytes`."""
        self._architecture = read_architecture(directory)
        self._files: dict[str, SafetensorsFile] = {}
        try:
            self._where = self._open(directory)
            self._digest = WeightsDigest(digests, [file.path for file in self._files.values()])
            size = sum(file.size for file in self._files.values())
            if size > max_bytes:
                raise CheckpointError(f"{directory}: the weights have {size} bytes, at most {max_bytes} are allowed")
            self._check_shapes(directory)
        except BaseException:
            self.close()
            raise

    @property
    def architecture(self) -> Architecture:
        return self._architecture

    @property
    def weight_files_digest(self) -> str:
        return self._digest()

    def tensor(self, name: str, layer: int | None = None) -> F32:
        place = self._place(name, layer)
        return self._read(place, 0, place.rows)

    def rows(self, name: str, start: int, stop: int, layer: int | None = None) -> F32:
        place = self._place(name, layer)
        if not 0 <= start <= stop <= place.rows:
            raise CheckpointError(f"{name} has rows 0 to {place.rows}, not {start} to {stop}")
        return self._read(place, start, stop)

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _read(self, place: _Place, start: int, stop: int) -> F32:
        return self._where[place.name].read(place.name, place.first + start, place.first + stop)

    def _open(self, directory: Path) -> dict[str, SafetensorsFile]:
        """Opens the files; the file of each stored tensor."""
        single, index = directory / SINGLE, directory / INDEX
        if single.exists() or single.is_symlink() or not index.exists():
            self._files[SINGLE] = SafetensorsFile(single)
            return dict.fromkeys(self._files[SINGLE].tensors, self._files[SINGLE])
        listed = read_object(index, MAX_INDEX_BYTES).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise CheckpointError(f"{index}: weight_map, an object of tensor and file names, is missing")
        shards = set()
        for name in listed.values():
            if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name):
                raise CheckpointError(f"{index}: {repr(name)[:100]} is no plain name of a safetensors file")
            shards.add(name)
        if len(shards) > MAX_SHARDS:
            raise CheckpointError(f"{index}: {len(shards)} files, at most {MAX_SHARDS} are opened")
        where: dict[str, SafetensorsFile] = {}
        for shard in sorted(shards):
            file = self._files[shard] = SafetensorsFile(directory / shard)
            for tensor in file.tensors:
                if where.setdefault(tensor, file) is not file:
                    raise CheckpointError(f"{file.path}: {tensor[:100]} is in {where[tensor].path.name} too")
        for tensor, shard in listed.items():
            if tensor not in where or where[tensor] is not self._files[shard]:
                raise CheckpointError(f"{index}: {tensor[:100]} is not in {shard}")
        return where

    def _check_shapes(self, directory: Path) -> None:
        arch = self._architecture
        every: list[tuple[str, int | None]] = [
            (name, None) for name in GLOBAL_TENSORS if name != "head" or not arch.tie_word_embeddings
        ]
        every += [(name, layer) for layer in range(arch.num_hidden_layers) for name in present_tensors(arch)]
        for name, layer in every:
            place = self._place(name, layer)
            if (file := self._where.get(place.name)) is None:
                raise CheckpointError(f"{directory}: tensor {place.name} is missing")
            stored = file.tensors[place.name]
            wanted = tensor_shape(arch, name)
            if name in ("gate", "up") and arch.family in _FUSED:
                wanted = (2 * wanted[0], *wanted[1:])
            if stored.dtype not in DTYPES:
                raise CheckpointError(
                    f"{file.path}: {place.name} is {stored.dtype}; this reader takes {', '.join(DTYPES)}"
                )
            if stored.shape != wanted:
                raise CheckpointError(
                    f"{file.path}: {place.name} has shape {stored.shape}, the configuration wants {wanted}"
                )

    def _place(self, name: str, layer: int | None) -> _Place:
        """Where a canonical tensor is stored. Raises CheckpointError for one that this architecture has not."""
        arch = self._architecture
        if layer is None:
            if name not in GLOBAL_TENSORS or (name == "head" and arch.tie_word_embeddings):
                raise CheckpointError(f"this model has no tensor {name}")
            return _Place(_GLOBAL_NAMES[name], 0, tensor_shape(arch, name)[0])
        if name not in LAYER_TENSORS or name not in present_tensors(arch) or not 0 <= layer < arch.num_hidden_layers:
            raise CheckpointError(f"this model has no tensor {name} in layer {layer}")
        rows = tensor_shape(arch, name)[0]
        stem = f"model.layers.{layer}."
        if name in ("gate", "up") and arch.family in _FUSED:
            return _Place(f"{stem}mlp.gate_up_proj.weight", rows if name == "up" else 0, rows)
        return _Place(stem + _LAYER_NAMES[name], 0, rows)
