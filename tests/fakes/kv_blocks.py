"""Blocks as a worker would make them, for tests of the cache."""

from __future__ import annotations

import random
from collections.abc import Sequence

from engine.prefix import block_checksum, block_hashes, scope_key
from services.cache.blocks import Block, BlockKey

VARIANT = "sha256:" + "a" * 64


def scope(tenant: str = "tenant", variant: str = VARIANT, block_tokens: int = 16) -> bytes:
    return scope_key(variant, tenant, block_tokens)


def chain(seed: int, length: int, tenant: str = "tenant", block_tokens: int = 16) -> list[BlockKey]:
    """Keys of one prompt's blocks. Prompts of one seed share their beginning."""
    key = scope(tenant, block_tokens=block_tokens)
    chooser = random.Random(seed)
    tokens = [chooser.randrange(4096) for _ in range(length * block_tokens)]
    return [BlockKey(key, name) for name in block_hashes(key, tokens, block_tokens)]


def block(key: BlockKey, size: int = 1000, parent: BlockKey | None = None) -> Block:
    """A block with bytes that follow from its key."""
    payload = random.Random(key.block_hash).randbytes(size)
    return Block(key, payload, block_checksum(key.scope, key.block_hash, payload), parent)


def blocks(keys: Sequence[BlockKey], size: int = 1000) -> list[Block]:
    return [block(key, size) for key in keys]
