"""Any ONNX model through onnxruntime: named arrays in, named arrays out. Has nothing to do with token sequences.

`OnnxModel.load` looks the file over first (`engine.checkpoints.onnx_file`), loads no library, runs on the CPU only, and
gives the runtime an arena of bounded size: a request that would need more fails, the process does not. A run blocks;
callers use a thread, and `Run.cancel` ends it between two operators. Inputs are checked here, with the names and shapes
the model declares, so that a mistake is the caller's InputError and not the runtime's riddle.
"""

from __future__ import annotations

import ctypes
import logging
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnxruntime

from engine.checkpoints.architecture import CheckpointError
from engine.checkpoints.onnx_file import OnnxFile, examine

log = logging.getLogger("autoglm.onnx")

Array: TypeAlias = "npt.NDArray[Any]"

STRING = np.dtype(object)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES: Mapping[str, np.dtype[Any]] = {
    "tensor(bool)": np.dtype(np.bool_),
    "tensor(int8)": np.dtype(np.int8),
    "tensor(int16)": np.dtype(np.int16),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(uint8)": np.dtype(np.uint8),
    "tensor(uint16)": np.dtype(np.uint16),
    "tensor(uint32)": np.dtype(np.uint32),
    "tensor(uint64)": np.dtype(np.uint64),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(float)": np.dtype(np.float32),
    "tensor(double)": np.dtype(np.float64),
    "tensor(bfloat16)": BFLOAT16,
    "tensor(string)": STRING,
}
BFLOAT16_CODE = 16
"""onnx.TensorProto.BFLOAT16."""
FOLDED_BYTES = 16 << 20
"""Largest constant made while loading; without a bound a few bytes of file could ask for any amount of memory."""
MAX_TENSORS = 4096
_FAILED_NODE = re.compile(r"while running (\w{1,64}) node\. Name:'([^']{0,256})'")


class RunError(Exception):
    """A run gave no result; the text may be shown to the caller."""


class InputError(RunError):
    """The inputs do not fit the model: change the request."""


class TooLarge(RunError):
    """The run would need more memory, or give a larger answer, than is allowed."""


class Cancelled(RunError):
    """The run was ended by `Run.cancel`."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one model."""

    model_bytes: int = 16 << 30
    """The file and its external data."""
    arena_bytes: int = 1 << 30
    """Memory of all runs at one time, weights apart. One arena per process: the first model's bound holds."""
    output_bytes: int = 16 << 20
    threads: int = 1
    """Threads of one run."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """An input or output as the model declares it. A dimension of -1 is any size."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


class Run:
    """A handle on one computation."""

    def __init__(self) -> None:
        self.options = onnxruntime.RunOptions()
        self.options.log_severity_level = 4  # what fails is reported by the exception
        self.options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")

    def cancel(self) -> None:
        """Ends the run soon, or keeps it from beginning. From any thread, at any time."""
        self.options.terminate = True


class OnnxModel:
    """A loaded model. `run` may be called from several threads at once."""

    def __init__(self, file: OnnxFile, session: Any, limits: Limits) -> None:
        self.file, self._session, self._limits = file, session, limits
        try:
            self.inputs = {spec.name: spec for spec in map(_spec, session.get_inputs())}
            self.outputs = {spec.name: spec for spec in map(_spec, session.get_outputs())}
        except KeyError as error:
            raise CheckpointError(f"{file.path}: it has a tensor of {error.args[0]}, which is not served") from None
        if len(self.inputs) + len(self.outputs) > MAX_TENSORS:
            raise CheckpointError(f"{file.path}: more than {MAX_TENSORS} inputs and outputs")
        self._has_bfloat16 = any(spec.dtype == BFLOAT16 for spec in (*self.inputs.values(), *self.outputs.values()))
        if self._has_bfloat16 and any(spec.dtype == STRING for spec in self.inputs.values()):
            raise CheckpointError(f"{file.path}: string inputs beside bfloat16 tensors, which the runtime cannot take")

    @classmethod
    def load(cls, path: Path, limits: Limits) -> OnnxModel:
        """Checks and loads a file. Blocks. Raises CheckpointError."""
        file = examine(path, limits.model_bytes)
        try:
            session = _session(file, limits)
        except Exception as error:  # the runtime raises its own kinds, which share no base
            log.warning("onnxruntime refused the model", extra={"facts": {"reason": str(error)}})
            raise CheckpointError(f"{path}: onnxruntime cannot load it ({_first_line(error)})") from None
        return cls(file, session, limits)

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str], run: Run) -> list[Array]:
        """The named outputs, or all of them in the model's order for an empty list. Blocks. Raises RunError."""
        names = list(outputs) or list(self.outputs)
        for name in names:
            if name not in self.outputs:
                raise InputError(f"output {name[:64]!r} does not exist; there are {_listed(self.outputs)}")
        self._check(feeds)
        try:
            if self._has_bfloat16:  # which numpy does not know, so the runtime's own values go in and come out
                values = {name: _to_runtime(array) for name, array in feeds.items()}
                results = self._session.run_with_ort_values(names, values, run.options)
            else:
                results = self._session.run(names, {name: _whole(array) for name, array in feeds.items()}, run.options)
        except Exception as error:
            raise self._meaning(error, run) from None
        return self._arrays(names, results)

    def _check(self, feeds: Mapping[str, Array]) -> None:
        for name in feeds:
            if name not in self.inputs:
                raise InputError(f"input {name[:64]!r} does not exist; there are {_listed(self.inputs)}")
        for name, spec in self.inputs.items():
            if name not in feeds:
                raise InputError(f"input {name!r} is missing")
            array = feeds[name]
            if array.dtype != spec.dtype:
                raise InputError(f"input {name!r} is {_called(array.dtype)}, the model takes {_called(spec.dtype)}")
            fits = len(array.shape) == len(spec.shape) and all(
                wanted in (-1, seen) for seen, wanted in zip(array.shape, spec.shape, strict=True)
            )
            if not fits:
                raise InputError(f"input {name!r} has shape {list(array.shape)}, the model takes {list(spec.shape)}")

    def _meaning(self, error: Exception, run: Run) -> RunError:
        text = str(error)
        if run.options.terminate:
            return Cancelled("the run was cancelled")
        log.info("a run failed", extra={"facts": {"model": self.file.path.name, "reason": text[:2000]}})
        if "Available memory" in text or "Failed to allocate" in text or isinstance(error, MemoryError):
            return TooLarge(f"the run needs more than the {self._limits.arena_bytes} bytes that all runs may use")
        node = _FAILED_NODE.search(text)
        at = f"at operator {node[1]} {node[2]!r}" if node else "before the first operator"
        return InputError(f"the model cannot compute these inputs: it failed {at}")

    def _arrays(self, names: Sequence[str], results: Sequence[Any]) -> list[Array]:
        arrays, left = [], self._limits.output_bytes
        for name, value in zip(names, results, strict=True):
            array = _from_runtime(value) if self._has_bfloat16 else value
            if not isinstance(array, np.ndarray):
                raise RunError(f"output {name!r} has no tensor for these inputs")
            left -= sum(len(text) + 4 for text in array.flat) if array.dtype == STRING else array.nbytes
            if left < 0:
                raise TooLarge(f"the outputs have more than the {self._limits.output_bytes} bytes that are allowed")
            arrays.append(array)
        return arrays


_arena_lock = threading.Lock()
_arena_made = False


def _bound_arena(limits: Limits) -> None:
    """One arena for the process, made at the first load: the runtime knows no other way to bound memory."""
    global _arena_made
    with _arena_lock:
        if _arena_made:
            return
        kind = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR
        memory = onnxruntime.OrtMemoryInfo("Cpu", kind, 0, onnxruntime.OrtMemType.DEFAULT)
        settings = {
            "max_mem": limits.arena_bytes,
            "arena_extend_strategy": 1,  # as much as is asked for, not the next power of two
            "initial_chunk_size_bytes": -1,
            "max_dead_bytes_per_chunk": -1,
        }
        onnxruntime.create_and_register_allocator(memory, onnxruntime.OrtArenaCfg(settings))
        _arena_made = True


def _session(file: OnnxFile, limits: Limits) -> Any:
    onnxruntime.disable_telemetry_events()
    _bound_arena(limits)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = limits.threads, 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 4
    for key, value in {
        "session.use_env_allocators": "1",
        "session.use_device_allocator_for_initializers": "1",  # weights have their own bound and leave the arena alone
        "session.intra_op.allow_spinning": "0",
        "optimization.constant_folding_max_output_size_in_bytes": str(FOLDED_BYTES),
    }.items():
        options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(str(file.path.resolve()), options, providers=["CPUExecutionProvider"])


def _spec(argument: Any) -> TensorSpec:
    """KeyError names a type that is no tensor we serve."""
    shape = tuple(size if isinstance(size, int) and size >= 0 else -1 for size in argument.shape)
    return TensorSpec(argument.name, DTYPES[argument.type], shape)


def _whole(array: Array) -> Array:
    return np.ascontiguousarray(array).reshape(array.shape)  # ascontiguousarray makes one dimension of none


def _to_runtime(array: Array) -> Any:
    whole = _whole(array)
    if whole.dtype == BFLOAT16:
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(whole.view(np.uint16), BFLOAT16_CODE)
    return onnxruntime.OrtValue.ortvalue_from_numpy(whole)


def _from_runtime(value: Any) -> Array | None:
    if not value.has_value() or not value.is_tensor():
        return None
    if value.element_type() == BFLOAT16_CODE:
        size = value.tensor_size_in_bytes()
        bits = ctypes.string_at(value.data_ptr(), size) if size else b""  # copied while `value` keeps it alive
        return np.frombuffer(bits, BFLOAT16).reshape(value.shape())
    array: Array = value.numpy()
    return array


def _called(dtype: np.dtype[Any]) -> str:
    return "string" if dtype == STRING else str(dtype)


def _listed(specs: Mapping[str, TensorSpec]) -> str:
    names = [repr(name[:64]) for name in list(specs)[:8]]
    return ", ".join(names) + (" and more" if len(specs) > 8 else "")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or ["no reason given"])[0][:300]
