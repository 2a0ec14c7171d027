"""The tokenizer inside a GGUF file, as the text files of a model directory. Standard library only.

Called by the tokenizer service in place of reading tokenizer.json and tokenizer_config.json. A file may carry the
original tokenizer.json (`tokenizer.huggingface.json`), which is used when its ids are those of the token list.
Otherwise one is built: byte-level BPE ("gpt2") with one of the pre-tokenizers below, or SentencePiece ("llama") with
scores, whose merges follow from the scores. A pre-tokenizer that is not listed is refused: it would give other ids.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.checkpoints.errors import CheckpointError
from engine.checkpoints.gguf_header import Header, Value, read_header

CONTROL, USER_DEFINED, UNUSED, BYTE, UNKNOWN, NORMAL = 3, 4, 5, 6, 2, 1
"""tokenizer.ggml.token_type."""
HF_JSON = "tokenizer.huggingface.json"
MAX_TOKENS = 1_000_000
MAX_TOKEN_CHARACTERS = 128
"""Longer entries of a SentencePiece vocabulary are not looked at for merges (its trainer makes none)."""
MAX_CHARACTERS = 4_000_000
"""Of all entries of such a vocabulary together; each is a place where a merge is looked for."""

_GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (_GPT4.replace("DIGITS", "{1,3}"),)
PRE_TOKENIZERS: Mapping[str, tuple[str, ...]] = {
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "chatglm-bpe": _LLAMA3,
    "glm4": _LLAMA3,
    "qwen2": (_GPT4.replace("DIGITS", ""),),
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "starcoder": (r"\p{N}", _GPT2),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
"""tokenizer.ggml.pre → patterns, each of which splits what the one before left."""
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3")
"""A piece of text that is a token as it stands is taken without merges; a start token is the default."""


@dataclass(frozen=True, slots=True)
class TextFiles:
    """What a model directory keeps in tokenizer.json and tokenizer_config.json."""

    tokenizer: dict[str, Any]
    chat_template: str | None
    special_tokens: dict[str, str]
    """By the names that templates use: bos_token, eos_token …"""


def read_text_files(path: Path) -> TextFiles:
    """Raises CheckpointError."""
    header = read_header(path)
    tokens = header.texts("tokenizer.ggml.tokens")
    if not tokens or len(tokens) > MAX_TOKENS:
        raise CheckpointError(
            f"{path}: tokenizer.ggml.tokens has {len(tokens or ())} entries; 1 to {MAX_TOKENS} are read"
        )
    if len(set(tokens)) != len(tokens):
        raise CheckpointError(f"{path}: tokenizer.ggml.tokens holds an entry twice")
    types = header.numbers("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise CheckpointError(f"{path}: {len(types)} token types for {len(tokens)} tokens")
    special = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        if f"tokenizer.ggml.{key}_token_id" in header.metadata:
            special[f"{name}_token"] = tokens[header.whole(f"tokenizer.ggml.{key}_token_id", 0, len(tokens) - 1)]
    return TextFiles(
        tokenizer=_tokenizer(header, tokens, types),
        chat_template=header.text("tokenizer.chat_template"),
        special_tokens=special,
    )


def metadata_digest(path: Path) -> str:
    """`sha256:` and 64 hexadecimal digits over all `tokenizer.*` metadata, whatever their order in the file."""
    metadata = read_header(path).metadata
    hasher = hashlib.sha256(b"autoglm-tokenizer-gguf-v1\0")
    for key in sorted(key for key in metadata if key.startswith("tokenizer.")):
        content = _canonical(metadata[key])
        hasher.update(key.encode() + b"\0" + len(content).to_bytes(8, "little"))
        hasher.update(content)
    return f"sha256:{hasher.hexdigest()}"


def _canonical(value: Value) -> bytes:
    if isinstance(value, bytes):
        return b"s" + value
    if isinstance(value, list):
        return b"S" + b"".join(len(each).to_bytes(8, "little") + each for each in value)
    if isinstance(value, (bool, int, float)):
        return repr(value).encode()
    return value.typecode.encode() + value.tobytes()


def _tokenizer(header: Header, tokens: Sequence[str], types: Sequence[float]) -> dict[str, Any]:
    original = header.text(HF_JSON)
    if original is not None:
        return _checked(header, original, tokens, types)
    model = header.text("tokenizer.ggml.model")
    if model == "gpt2":
        return _byte_level(header, tokens, types)
    if model == "llama":
        return _sentencepiece(header, tokens, types)
    raise CheckpointError(f"{header.path}: tokenizer.ggml.model is {str(model)[:100]!r}; gpt2 and llama are supported")


def _checked(header: Header, text: str, tokens: Sequence[str], types: Sequence[float]) -> dict[str, Any]:
    """The original tokenizer.json, if it gives the same ids as the token list that llama.cpp reads."""
    try:
        source = json.loads(text)
        vocabulary = source["model"]["vocab"]
        ids = {str(entry): int(index) for entry, index in vocabulary.items()}
        ids |= {str(token["content"]): int(token["id"]) for token in source.get("added_tokens") or ()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{header.path}: {HF_JSON} is no tokenizer.json ({error})") from None
    listed = {token: index for index, token in enumerate(tokens) if types[index] != UNUSED or token in ids}
    if ids != listed:
        raise CheckpointError(f"{header.path}: {HF_JSON} and tokenizer.ggml.tokens disagree")
    result: dict[str, Any] = source
    return result


def _added(tokens: Sequence[str], types: Sequence[float]) -> list[dict[str, Any]]:
    return [
        {
            "id": index, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": types[index] != USER_DEFINED,
        }
        for index, token in enumerate(tokens)
        if types[index] in (CONTROL, USER_DEFINED, UNKNOWN) and token
    ]  # fmt: skip


def _around(header: Header, tokens: Sequence[str], adds_start: bool) -> dict[str, Any] | None:
    """The post-processor: start and end token where the file wants them."""
    single: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
    special: dict[str, Any] = {}
    for name, place, default in (("bos", 0, adds_start), ("eos", 1, False)):
        key = f"tokenizer.ggml.{name}_token_id"
        if header.flag(f"tokenizer.ggml.add_{name}_token", default) and key in header.metadata:
            number = header.whole(key, 0, len(tokens) - 1)
            text = tokens[number]
            single.insert(0 if place == 0 else len(single), {"SpecialToken": {"id": text, "type_id": 0}})
            special[text] = {"id": text, "ids": [number], "tokens": [text]}
    if not special:
        return None
    pair = [*single, {"Sequence": {"id": "B", "type_id": 0}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


def _byte_level(header: Header, tokens: Sequence[str], types: Sequence[float]) -> dict[str, Any]:
    pre = header.text("tokenizer.ggml.pre", "default") or "default"
    if pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise CheckpointError(f"{header.path}: tokenizer.ggml.pre is {pre[:100]!r}; supported are {known}")
    merges = []
    for text in header.texts("tokenizer.ggml.merges") or ():
        left, space, right = text.partition(" ")
        if not (left and space and right) or " " in right:
            raise CheckpointError(f"{header.path}: tokenizer.ggml.merges holds {text[:100]!r}")
        merges.append([left, right])
    splits: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in PRE_TOKENIZERS[pre]
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(tokens, types),
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "post_processor": _around(header, tokens, pre in _WHOLE_WORDS),
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": pre in _WHOLE_WORDS,
            "vocab": {token: index for index, token in enumerate(tokens) if types[index] != UNUSED},
            "merges": merges,
        },
    }  # fmt: skip


def _sentencepiece(header: Header, tokens: Sequence[str], types: Sequence[float]) -> dict[str, Any]:
    scores = header.numbers("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise CheckpointError(f"{header.path}: tokenizer.ggml.scores must have one score per token")
    vocabulary = {token: index for index, token in enumerate(tokens) if types[index] != UNUSED}
    unknown = next((token for index, token in enumerate(tokens) if types[index] == UNKNOWN), None)
    prefixed = header.flag("tokenizer.ggml.add_space_prefix", True)
    normal = {token: index for token, index in vocabulary.items() if types[index] == NORMAL}
    if sum(map(len, normal)) > MAX_CHARACTERS:
        raise CheckpointError(f"{header.path}: the vocabulary has more than {MAX_CHARACTERS} characters")
    before = [{"type": "Prepend", "prepend": "▁"}] if prefixed else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefixed else []
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(tokens, types),
        "normalizer": {
            "type": "Sequence",
            "normalizers": [*before, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}],
        },
        "pre_tokenizer": None,
        "post_processor": _around(header, tokens, True),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"}, *strip,
            ],
        },
        "model": {
            "type": "BPE", "dropout": None, "unk_token": unknown, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
            "vocab": vocabulary, "merges": _merges(normal, scores),
        },
    }  # fmt: skip


def _merges(vocabulary: Mapping[str, int], scores: Sequence[float]) -> list[list[str]]:
    """SentencePiece joins the neighbours whose union scores best; as a list of merges, best first."""
    found: list[tuple[float, int, int, str, str]] = []
    for token, index in vocabulary.items():
        if len(token) > MAX_TOKEN_CHARACTERS:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                found.append((-scores[index], vocabulary[left], vocabulary[right], left, right))
    found.sort()
    return [[left, right] for _, _, _, left, right in found]
