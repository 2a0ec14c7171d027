"""The byte form of a block: every byte of it is covered."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.cache.blocks import HEADER_BYTES, BadBlock, Block, BlockKey, pack, unpack
from tests.fakes import kv_blocks

KEYS = kv_blocks.chain(1, 2)
BLOCK = kv_blocks.block(KEYS[1], 64, KEYS[0])
DATA = pack(BLOCK)


def test_a_block_survives_its_byte_form() -> None:
    """Pack and unpack give the same block back."""
    assert unpack(DATA, KEYS[1]) == BLOCK


def test_any_flipped_bit_is_noticed() -> None:
    """All bits of header and payload, one after another."""
    for position in range(len(DATA)):
        for bit in range(8):
            damaged = bytearray(DATA)
            damaged[position] ^= 1 << bit
            with pytest.raises(BadBlock):
                unpack(bytes(damaged), KEYS[1])


@settings(deadline=None)
@given(st.one_of(st.binary(max_size=400), st.integers(0, len(DATA) - 1).map(lambda n: DATA[:n])), st.binary(max_size=3))
def test_garbage_and_truncation_are_noticed(data: bytes, more: bytes) -> None:
    """Random bytes, cut blocks and blocks with something appended are refused, never misread."""
    with pytest.raises(BadBlock):
        unpack(data, KEYS[1])
    if more:
        with pytest.raises(BadBlock):
            unpack(DATA + more, KEYS[1])


@pytest.mark.parametrize(
    "wanted",
    [
        KEYS[0],
        BlockKey(kv_blocks.scope("other"), KEYS[1].block_hash),
        BlockKey(kv_blocks.scope(variant="sha256:" + "b" * 64), KEYS[1].block_hash),
        BlockKey(kv_blocks.scope(block_tokens=32), KEYS[1].block_hash),
    ],
)
def test_a_valid_block_under_another_key_is_refused(wanted: BlockKey) -> None:
    """Another prefix, tenant, variant or block size: the bytes are fine, the key is not."""
    with pytest.raises(BadBlock, match="another block"):
        unpack(DATA, wanted)
    assert not Block(wanted, BLOCK.payload, BLOCK.checksum).is_intact()


def test_header_size_is_fixed() -> None:
    """The on-disk format is version 1 with a header of 176 bytes; changing it needs a new magic."""
    assert HEADER_BYTES == 176
    assert DATA[:8] == b"AGLMKV01"
