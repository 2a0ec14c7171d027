"""From a template's marked output to a prompt: which parts are control tokens, which are only words.

Stretches of plain text are encoded whole, template and message together, because a vocabulary may merge the template's
newline with a message's indentation; only control tokens that the template itself wrote divide them.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from services.tokenizer.vocabulary import ControlToken, Vocabulary

_NONCE_CHARACTERS = 10
_FIRST_PRIVATE, _LAST_PRIVATE = 0xE001, 0xF8FF
_FIRST_INDEX = 0xF0000
MAX_CONTROLS = 0xFFFD


@dataclass(frozen=True, slots=True)
class Marks:
    """One mark per control token: a nonce of private-use characters (about 126 bits) and a number."""

    nonce: str
    tokens: Sequence[ControlToken]

    @property
    def by_text(self) -> Mapping[str, str]:
        """Control token → its mark."""
        return {token.text: f"{self.nonce}{chr(_FIRST_INDEX + index)}" for index, token in enumerate(self.tokens)}


@dataclass(frozen=True, slots=True)
class Prompt:
    """A rendered conversation."""

    text: str
    token_ids: list[int]


def make_marks(vocabulary: Vocabulary) -> Marks:
    """Marks for `vocabulary` that nobody outside this process can know."""
    tokens = tuple(vocabulary.controls.values())
    if len(tokens) > MAX_CONTROLS:
        raise ValueError(f"{len(tokens)} added tokens, at most {MAX_CONTROLS} are supported")
    span = _LAST_PRIVATE - _FIRST_PRIVATE + 1
    return Marks("".join(chr(_FIRST_PRIVATE + secrets.randbelow(span)) for _ in range(_NONCE_CHARACTERS)), tokens)


def divide(rendered: str, marks: Marks) -> list[str | ControlToken]:
    """The output as plain stretches and control tokens, in order; white space that a token swallows is gone."""
    last = chr(_FIRST_INDEX + len(marks.tokens) - 1) if marks.tokens else chr(_FIRST_INDEX)
    parts = re.split(f"{re.escape(marks.nonce)}([{chr(_FIRST_INDEX)}-{last}])", rendered)
    divided: list[str | ControlToken] = []
    swallow = False
    for index, part in enumerate(parts):
        if index % 2:
            token = marks.tokens[ord(part) - _FIRST_INDEX]
            divided.append(token)
            swallow = token.strips_right
            continue
        text = part.lstrip() if swallow else part
        if index + 1 < len(parts) and marks.tokens[ord(parts[index + 1]) - _FIRST_INDEX].strips_left:
            text = text.rstrip()
        if text:
            divided.append(text)
    return divided


def restore(rendered: str, marks: Marks) -> str:
    """The output as a reader sees it, control tokens written out."""
    for text, mark in marks.by_text.items():
        rendered = rendered.replace(mark, text)
    return rendered


def encode_prompt(vocabulary: Vocabulary, rendered: str, marks: Marks) -> Prompt:
    """Ids of the output. A control token comes only from a mark, never from the words of a message."""
    ids: list[int] = []
    for index, part in enumerate(divide(rendered, marks)):
        if isinstance(part, ControlToken):
            ids.append(part.token_id)
        else:
            ids += vocabulary.encode_run(part, is_first=index == 0)
    return Prompt(restore(rendered, marks), ids)
