"""Names prompt prefixes by content: chained hashes over whole blocks of token ids.

Worker, cache and scheduler compute the same names from the same tokens, so a prefix can be found without sending it.
The scope is hashed first: a block of another variant, tenant or block size has another name and can never be hit.
"""

from __future__ import annotations

import array
import hashlib
import sys
from collections.abc import Sequence

HASH_BYTES = 32
_WORD_BYTES = array.array("I").itemsize


def scope_key(variant_digest: str, tenant: str, block_tokens: int) -> bytes:
    """32 bytes that fence the chain. Raises ValueError when a part is unknown (empty): fail closed."""
    if not variant_digest or not tenant or block_tokens < 1:
        raise ValueError("variant digest, tenant and block size must all be known")
    hasher = hashlib.blake2b(digest_size=HASH_BYTES, person=b"autoglm-prefix")
    for part in (variant_digest.encode(), tenant.encode(), str(block_tokens).encode()):
        hasher.update(len(part).to_bytes(4, "little"))
        hasher.update(part)
    return hasher.digest()


def block_hashes(scope: bytes, token_ids: Sequence[int], block_tokens: int) -> list[bytes]:
    """One 32-byte hash per whole block of `block_tokens` ids; hash i covers every token up to the end of block i."""
    data = _packed(token_ids)
    size = block_tokens * _WORD_BYTES
    hashes: list[bytes] = []
    parent = scope
    for start in range(0, len(data) - size + 1, size):
        parent = hashlib.blake2b(data[start : start + size], digest_size=HASH_BYTES, key=parent).digest()
        hashes.append(parent)
    return hashes


def next_hash(parent: bytes, block: Sequence[int]) -> bytes:
    """The hash of one more whole block after the one named `parent` (the scope key before the first)."""
    return hashlib.blake2b(_packed(block), digest_size=HASH_BYTES, key=parent).digest()


def block_checksum(scope: bytes, block_hash: bytes, payload: bytes) -> bytes:
    """BLAKE2b-256 that binds a stored block's content to its scope key and hash; writer, cache and reader check it."""
    if len(scope) != HASH_BYTES or len(block_hash) != HASH_BYTES:
        raise ValueError(f"scope key and block hash have {HASH_BYTES} bytes each")
    hasher = hashlib.blake2b(digest_size=HASH_BYTES, person=b"autoglm-block")
    hasher.update(scope)
    hasher.update(block_hash)
    hasher.update(payload)
    return hasher.digest()


def _packed(token_ids: Sequence[int]) -> bytes:
    words = array.array("I", token_ids)
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()
