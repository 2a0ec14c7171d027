"""What is stored: immutable key-value blocks, fenced by scope. And the byte form they have outside memory.

The byte form (disk file, Redis value) is: magic, scope key, block hash, parent hash (zeros: not known), checksum,
payload size, a digest of all this, payload. Every byte is covered: the header by its own digest, the payload by the
checksum, which also binds it to scope and hash.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from dataclasses import dataclass
from typing import NamedTuple

from engine.prefix import HASH_BYTES, block_checksum

MAGIC = b"AGLMKV01"
_FIELDS = struct.Struct(f"<8s{HASH_BYTES}s{HASH_BYTES}s{HASH_BYTES}s{HASH_BYTES}sQ")
HEADER_BYTES = _FIELDS.size + HASH_BYTES
_UNKNOWN = bytes(HASH_BYTES)


class BlockKey(NamedTuple):
    """Names a block. The scope key hashes variant, tenant and block size: another scope is another key."""

    scope: bytes
    block_hash: bytes


class BadBlock(ValueError):
    """Stored bytes are not the block they should be; the text says why."""


@dataclass(frozen=True, slots=True)
class Block:
    """A block with its proof. `parent` is its predecessor in the prompt, where known: it only steers eviction."""

    key: BlockKey
    payload: bytes
    checksum: bytes
    parent: BlockKey | None = None

    def is_intact(self) -> bool:
        """Whether the checksum fits scope, hash and payload."""
        return hmac.compare_digest(self.checksum, block_checksum(self.key.scope, self.key.block_hash, self.payload))


@dataclass(frozen=True, slots=True)
class Header:
    """The part before the payload."""

    key: BlockKey
    parent: BlockKey | None
    checksum: bytes
    payload_bytes: int


def pack(block: Block) -> bytes:
    """The byte form."""
    parent = block.parent.block_hash if block.parent else _UNKNOWN
    fields = _FIELDS.pack(MAGIC, block.key.scope, block.key.block_hash, parent, block.checksum, len(block.payload))
    return b"".join((fields, _header_digest(fields), block.payload))


def read_header(data: bytes) -> Header:
    """Raises BadBlock."""
    if len(data) < HEADER_BYTES:
        raise BadBlock("truncated header")
    fields = data[: _FIELDS.size]
    if not hmac.compare_digest(_header_digest(fields), data[_FIELDS.size : HEADER_BYTES]):
        raise BadBlock("damaged header")
    magic, scope, block_hash, parent, checksum, size = _FIELDS.unpack(fields)
    if magic != MAGIC:
        raise BadBlock("another format")
    key = BlockKey(scope, block_hash)
    return Header(key, None if parent == _UNKNOWN else BlockKey(scope, parent), checksum, size)


def unpack(data: bytes, wanted: BlockKey) -> Block:
    """The block, proved to be `wanted` and whole. Raises BadBlock."""
    header = read_header(data)
    if header.key != wanted:
        raise BadBlock("another block")
    if header.payload_bytes != len(data) - HEADER_BYTES:
        raise BadBlock("truncated payload")
    block = Block(wanted, data[HEADER_BYTES:], header.checksum, header.parent)
    if not block.is_intact():
        raise BadBlock("damaged payload")
    return block


def _header_digest(fields: bytes) -> bytes:
    return hashlib.blake2b(fields, digest_size=HASH_BYTES, person=b"autoglm-header").digest()
