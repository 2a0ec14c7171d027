"""Kernels for quantised and neuron-sparse transformers on CPUs; every instruction set gives the same bits."""

from autoglm_kernels._native import (
    Device,
    Model,
    PackedMatrix,
    Sampler,
    available,
    pack_rows,
    packed_bytes,
    padded_rows,
)

__all__ = ["Device", "Model", "PackedMatrix", "Sampler", "available", "pack_rows", "packed_bytes", "padded_rows"]
