"""Types of the compiled part. Arrays are C-contiguous and keep their dtype: nothing is converted on the way in."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

class Device:
    """An instruction set and the threads that run it. An empty name takes the best set of this CPU."""

    def __init__(self, threads: int = 1, pin: bool = False, isa: str = "") -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def threads(self) -> int: ...

def available() -> list[str]:
    """Instruction sets of this CPU, the plainest first."""

class PackedMatrix:
    """A matrix [n, k] in packed bytes; it keeps the arrays alive.

    kind is int8, int4 or bf16; layout is panels, rows or columns.
    """

    def __init__(
        self,
        kind: str,
        layout: str,
        n: int,
        k: int,
        group: int,
        data: NDArray[np.uint8],
        scales: NDArray[np.uint16],
    ) -> None: ...
    @property
    def nbytes(self) -> int: ...
    def dequantise(self) -> NDArray[np.float32]:
        """The weights the packed bytes stand for, [n, k]."""
    def multiply(self, device: Device, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """[rows, k] times the transposed matrix: [rows, n]."""

def packed_bytes(kind: str, layout: str, n: int, k: int, group: int) -> tuple[int, int]:
    """Bytes of the data and of the scales."""

def padded_rows(kind: str, layout: str, n: int, k: int, group: int) -> int: ...
def pack_rows(
    kind: str,
    layout: str,
    n: int,
    group: int,
    src: NDArray[np.float32],
    first: int,
    data: NDArray[np.uint8],
    scales: NDArray[np.uint16],
    importance: NDArray[np.float32] | None = None,
) -> None:
    """Writes rows first, first + 1, ... of the matrix; importance [k] weighs the squared errors of int4."""

class Model:
    """A whole decoder; see the native executor for the names in its dictionaries."""

    def __init__(
        self,
        device: Device,
        shape: dict[str, Any],
        globals: dict[str, Any],
        layers: list[dict[str, Any]],
    ) -> None: ...
    @property
    def page_bytes(self) -> int: ...
    def set_pages(self, pages: NDArray[np.uint8]) -> None: ...
    @property
    def dense_above(self) -> float: ...
    @dense_above.setter
    def dense_above(self, share: float, /) -> None: ...
    @property
    def phase_seconds(self) -> dict[str, float]: ...
    @property
    def active_neurons(self) -> int: ...
    @property
    def all_neurons(self) -> int: ...
    def step(
        self,
        tokens: NDArray[np.int32],
        spans: NDArray[np.int32],
        pages: NDArray[np.int32],
        wanted: NDArray[np.int32],
        logits: NDArray[np.float32],
    ) -> None: ...

class Sampler:
    """Draws tokens; ties go to the lower id."""

    def __init__(self, device: Device) -> None: ...
    def draw(
        self,
        logits: NDArray[np.float32],
        temperature: float = 1.0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        top_k: int = 0,
        uniform: float = 0.0,
        bias_ids: NDArray[np.int32] | None = None,
        bias: NDArray[np.float32] | None = None,
        seen_ids: NDArray[np.int32] | None = None,
        seen_output: NDArray[np.int32] | None = None,
        repetition: float = 1.0,
        presence: float = 0.0,
        frequency: float = 0.0,
        allowed: NDArray[np.uint32] | None = None,
    ) -> int:
        """A token id; -1 when a logit is NaN or plus infinity, -2 when no token is allowed."""
    def logprobs(
        self, logits: NDArray[np.float32], token: int, top: int = 0
    ) -> tuple[float, list[tuple[int, float]]]: ...
