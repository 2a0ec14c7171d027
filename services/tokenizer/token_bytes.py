"""The bytes behind a vocabulary entry, for the two families of vocabularies that carry every byte.

*Byte level* (GPT-2, GLM, Llama 3, Qwen): each character of an entry stands for one byte. *Byte fallback*
(SentencePiece: Llama 2, Mistral): `▁` is a space and `<0x41>` is a byte. Other decoders are refused, not guessed at.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class DecoderKind:
    """How entries become bytes."""

    is_byte_level: bool
    drops_leading_space: bool


def decoder_kind(decoder: Mapping[str, Any] | None) -> DecoderKind:
    """Reads the `decoder` part of a tokenizer.json. Raises ValueError for one that is not supported."""
    steps = _steps(decoder)
    names = [step.get("type") for step in steps]
    if names == ["ByteLevel"]:
        return DecoderKind(is_byte_level=True, drops_leading_space=False)
    if names == ["Metaspace"]:
        return DecoderKind(is_byte_level=False, drops_leading_space=steps[0].get("prepend_scheme", "always") != "never")
    if "ByteFallback" in names and set(names) <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        for step in steps:
            if step["type"] == "Replace" and (step.get("pattern"), step.get("content")) != ({"String": "▁"}, " "):
                raise ValueError("the decoder replaces something other than ▁ by a space")
            if step["type"] == "Strip" and (step.get("content"), step.get("start"), step.get("stop")) != (" ", 1, 0):
                raise ValueError("the decoder strips something other than one leading space")
        return DecoderKind(is_byte_level=False, drops_leading_space="Strip" in names)
    raise ValueError(f"the decoder {names} is not supported; ByteLevel and byte-fallback decoders are")


def token_bytes(entry: str, kind: DecoderKind, is_added: bool) -> bytes:
    """The bytes of one entry."""
    if kind.is_byte_level:
        table = _byte_of_character()
        # An entry with any other character (an added token such as "<|end of turn|>") stands for its own UTF-8.
        if all(character in table for character in entry):
            return bytes(table[character] for character in entry)
        return entry.encode()
    if not is_added and (match := _BYTE_TOKEN.fullmatch(entry)):
        return bytes([int(match[1], 16)])
    return entry.encode() if is_added else entry.replace("▁", " ").encode()


def _steps(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if decoder is None:
        return []
    return list(decoder.get("decoders", [])) if decoder.get("type") == "Sequence" else [decoder]


@cache
def _byte_of_character() -> dict[str, int]:
    """The GPT-2 alphabet: printable Latin-1 stands for itself, the other bytes follow from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    return table | {chr(0x100 + index): byte for index, byte in enumerate(others)}
