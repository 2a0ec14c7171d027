"""The text side of a model as GGUF metadata, for the exporter: what `gguf_tokenizer` reads back.

The original tokenizer.json goes along whole (`tokenizer.huggingface.json`, a key of the GGUF specification), because
its splitting rules may have no name in llama.cpp's list. llama.cpp reads the token list, types, merges and the name.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.checkpoints.errors import CheckpointError
from engine.checkpoints.files import read_bounded
from engine.checkpoints.gguf_header import Value
from engine.checkpoints.gguf_tokenizer import (
    BYTE,
    CONTROL,
    HF_JSON,
    NORMAL,
    PRE_TOKENIZERS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)
from engine.checkpoints.json_files import parse_object, read_object

MAX_TOKENIZER_BYTES = 32 << 20
_FALLBACK = {"glm": "chatglm-bpe", "glm4": "glm4", "qwen2": "qwen2", "qwen3": "qwen2", "llama": "llama-bpe"}


@dataclass(frozen=True, slots=True)
class Text:
    """Metadata, and in words what llama.cpp will do differently."""

    metadata: dict[str, Value]
    notes: tuple[str, ...]


def text_metadata(directory: Path, family: str, vocab_size: int, end_token_ids: tuple[int, ...]) -> Text:
    """From tokenizer.json, tokenizer_config.json and chat_template.jinja. Raises CheckpointError."""
    path = directory / "tokenizer.json"
    if not path.exists():
        return Text({}, (f"{path} is not there: the file has no tokenizer",))
    try:
        raw = read_bounded(path, MAX_TOKENIZER_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    source = parse_object(raw, path)
    try:
        tokens, types = _tokens(source, vocab_size, path)
        model = source["model"]
        is_byte_level = not model.get("byte_fallback")
        merges = [each if isinstance(each, str) else " ".join(each) for each in model.get("merges") or ()]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{path}: not a tokenizer that can be written into a GGUF file ({error})") from None
    metadata: dict[str, Value] = {"tokenizer.ggml.model": b"gpt2" if is_byte_level else b"llama"}
    notes: list[str] = []
    if is_byte_level:
        name, note = _pre_tokenizer(source, family)
        metadata["tokenizer.ggml.pre"] = name.encode()
        metadata["tokenizer.ggml.merges"] = [merge.encode() for merge in merges]
        notes += [note] if note else []
    else:
        metadata["tokenizer.ggml.pre"] = b"default"
        metadata["tokenizer.ggml.scores"] = array("d", _scores(tokens, types, merges))
    metadata["tokenizer.ggml.tokens"] = [token.encode() for token in tokens]
    metadata["tokenizer.ggml.token_type"] = array("q", types)
    ids = {token: index for index, token in enumerate(tokens)}
    config_path = directory / "tokenizer_config.json"
    config = read_object(config_path, MAX_TOKENIZER_BYTES) if config_path.exists() else {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        token = config.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token in ids:
            metadata[f"tokenizer.ggml.{key}_token_id"] = ids[token]
    for key, number in zip(("eos", "eot", "eom"), end_token_ids, strict=False):
        metadata[f"tokenizer.ggml.{key}_token_id"] = number
    start = _start_token(source)
    metadata["tokenizer.ggml.add_bos_token"] = start is not None and start in ids
    if start is not None and start in ids:
        metadata["tokenizer.ggml.bos_token_id"] = ids[start]
    if (template := _template(directory, config)) is not None:
        metadata["tokenizer.chat_template"] = template.encode()
    metadata[HF_JSON] = raw
    return Text(metadata, tuple(notes))


def _tokens(source: Mapping[str, Any], vocab_size: int, path: Path) -> tuple[list[str], list[int]]:
    ids = {str(token): int(index) for token, index in source["model"]["vocab"].items()}
    unknown = source["model"].get("unk_token")
    kinds: dict[str, int] = {} if unknown is None else {unknown: UNKNOWN}
    if source["model"].get("byte_fallback"):
        kinds |= {token: BYTE for token in ids if len(token) == 6 and token.startswith("<0x") and token.endswith(">")}
    for added in source.get("added_tokens") or ():
        ids[added["content"]] = int(added["id"])
        kinds.setdefault(added["content"], CONTROL if added.get("special") else USER_DEFINED)
    names = {index: token for token, index in ids.items()}
    if len(names) != len(ids) or min(names, default=0) < 0 or max(names, default=0) >= vocab_size:
        raise CheckpointError(f"{path}: its ids are not distinct numbers below the model's vocab_size, {vocab_size}")
    tokens = [names.get(index, f"[PAD{index}]") for index in range(vocab_size)]
    if len(set(tokens)) != vocab_size:
        raise CheckpointError(f"{path}: it holds an entry like [PAD{vocab_size}]")
    return tokens, [kinds.get(token, NORMAL) if index in names else UNUSED for index, token in enumerate(tokens)]


def _scores(tokens: list[str], types: list[int], merges: list[str]) -> list[float]:
    """Earlier merges score higher; what no merge makes is below them all."""
    rank: dict[str, int] = {}
    for position, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", ""), position)
    return [
        0.0 if types[index] != NORMAL else -float(rank.get(token, len(merges) + index))
        for index, token in enumerate(tokens)
    ]


def _pre_tokenizer(source: Mapping[str, Any], family: str) -> tuple[str, str | None]:
    """llama.cpp's name for the splitting rules, and a note when it has none."""
    pre = source.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", []) if pre.get("type") == "Sequence" else [pre]
    patterns = tuple(step["pattern"].get("Regex") for step in steps if step.get("type") == "Split")
    if not patterns and any(step.get("type") == "ByteLevel" and step.get("use_regex", True) for step in steps):
        return "gpt-2", None
    preferred = _FALLBACK.get(family, "default")
    ignores = bool(source["model"].get("ignore_merges"))
    names = [preferred, *PRE_TOKENIZERS]
    for name in names:
        if PRE_TOKENIZERS[name] == patterns and (name in ("llama-bpe", "llama3", "llama-v3")) == ignores:
            return name, None
    return preferred, (
        f"llama.cpp has no name for this tokenizer's splitting rules; it will split like {preferred!r}, and some texts "
        "get other ids there (this project reads the original rules from the file)"
    )


def _start_token(source: Mapping[str, Any]) -> str | None:
    """The one token the post-processor puts before a text."""
    post = source.get("post_processor") or {}
    steps = post.get("processors", []) if post.get("type") == "Sequence" else [post]
    for step in steps:
        if step.get("type") == "TemplateProcessing":
            first = (step.get("single") or [{}])[0]
            special = first.get("SpecialToken")
            return str(special["id"]) if isinstance(special, dict) else None
    return None


def _template(directory: Path, config: Mapping[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.exists():
        try:
            return read_bounded(path, MAX_TOKENIZER_BYTES).decode()
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: {error}") from None
    template = config.get("chat_template")
    if isinstance(template, list):
        by_name = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = by_name.get("default")
    return template if isinstance(template, str) else None
