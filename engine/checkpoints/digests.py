"""Names a model directory's text side by content, so that worker, tokenizer and cache can tell whether they agree.

Called by the tokenizer service and by workers on the same directory; needs nothing but hashlib. Weights are not
covered.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from engine.checkpoints.files import read_bounded
from engine.checkpoints.gguf_tokenizer import metadata_digest

TEXT_FILES = ("tokenizer.json", "chat_template.jinja", "tokenizer_config.json", "special_tokens_map.json")
"""Everything that decides how text becomes ids: vocabulary, template, special tokens. Only the first must exist."""

MAX_TEXT_FILE_BYTES = 256 << 20


def tokenizer_digest(directory: Path) -> str:
    """`sha256:` and 64 hexadecimal digits over the raw bytes of TEXT_FILES, in that order; of a .gguf file over its
    tokenizer metadata.

    Hashed are, for each file that exists: its name, a zero byte, its size as 8 little-endian bytes, its bytes. A file
    that is missing adds nothing. Raises FileNotFoundError when there is no tokenizer.json, OSError for what is no
    regular file or larger than MAX_TEXT_FILE_BYTES, CheckpointError for a file that is no GGUF file.
    """
    if directory.suffix == ".gguf":
        return metadata_digest(directory)
    hasher = hashlib.sha256(b"autoglm-tokenizer-v1\0")
    for name in TEXT_FILES:
        path = directory / name
        if name != TEXT_FILES[0] and not path.exists():
            continue
        content = read_bounded(path, MAX_TEXT_FILE_BYTES)
        hasher.update(name.encode() + b"\0" + len(content).to_bytes(8, "little"))
        hasher.update(content)
    return f"sha256:{hasher.hexdigest()}"
