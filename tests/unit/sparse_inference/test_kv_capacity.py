"""How many key-value pages a worker has when nobody says."""

from __future__ import annotations

from dataclasses import replace

from engine.executors.native import page_bytes
from services.sparse_inference.engines import LEAST_PAGES, kv_pages
from services.sparse_inference.settings import WorkerSettings
from tests.unit.engine.test_packed import ARCH

BIG = replace(
    ARCH, num_hidden_layers=28, num_key_value_heads=2, head_dim=128, max_position_embeddings=32_768
)  # a model of 1.5 billion weights
SIZE = page_bytes(BIG, "bf16")


def test_running_requests_have_room_in_a_quarter_of_the_free_memory() -> None:
    """4096 tokens for each of them, at least one whole context; less where memory is short; never nothing."""
    automatic = WorkerSettings()
    assert kv_pages(automatic, BIG, SIZE, 20 << 30) == 16 * 4096 // 16
    assert kv_pages(automatic, BIG, SIZE, 2 << 30) == (2 << 30) // 4 // SIZE
    assert kv_pages(automatic, BIG, SIZE, 0) == LEAST_PAGES
    assert kv_pages(WorkerSettings(max_running=1), BIG, SIZE, 20 << 30) * 16 == 32_768


def test_a_given_capacity_is_kept() -> None:
    """Whatever the memory says."""
    assert kv_pages(WorkerSettings(kv_capacity_mib=8), BIG, SIZE, 0) == (8 << 20) // SIZE
