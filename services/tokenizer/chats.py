"""Chat templates of the loaded models: found, compiled in the sandbox, proved once, then used.

Before a template serves, it renders short conversations whose ids must equal those of the plain way (the whole text,
special tokens parsed). One that differs builds its special tokens from parts and cannot be told from a message's words:
it is switched off, not guessed at. The same renders show which roles it knows.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.checkpoints.errors import CheckpointError
from engine.checkpoints.gguf_tokenizer import read_text_files
from services.chassis.errors import InvalidRequest
from services.tokenizer.prompts import Marks, Prompt, encode_prompt, make_marks, restore
from services.tokenizer.sandbox import Sandbox, TemplateSource
from services.tokenizer.vocabulary import UnusableTokenizer, Vocabulary

log = logging.getLogger("autoglm.tokenizer.chats")

ROLES = ("system", "developer", "user", "assistant", "tool", "observation", "function")
"""Roles that a template may know; any other is refused before it reaches a template."""

MAX_CHAT_BYTES = 1 << 20
"""Bytes of all messages together, as the proto promises."""

_PROBE = "A short question of 12 words,\n    with an indented line?"
_SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")

Message = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A template that passed its proof."""

    marks: Marks
    roles: frozenset[str]


class Chats:
    """Renders conversations with the templates of several models."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._templates: dict[str, ChatTemplate] = {}

    async def start(self, models: Mapping[str, tuple[Path, Vocabulary]], max_file_bytes: int) -> dict[str, str]:
        """Compiles and proves every model's template. Returns name → reason for those that stay switched off."""
        sources: list[TemplateSource] = []
        marks: dict[str, Marks] = {}
        for name, (directory, vocabulary) in models.items():
            text, variables = read_template(directory, max_file_bytes)
            if text is not None:
                marks[name] = make_marks(vocabulary)
                sources.append(TemplateSource(name, text, marks[name].by_text, variables))
        broken = await self._sandbox.start(sources)
        for source in sources:
            if source.name in broken:
                continue
            vocabulary = models[source.name][1]
            try:
                roles = await self._prove(source.name, vocabulary, marks[source.name])
            except InvalidRequest as error:
                broken[source.name] = error.message
            else:
                self._templates[source.name] = ChatTemplate(marks[source.name], roles)
        return broken

    def has(self, model: str) -> bool:
        """Whether `model` has a template that serves."""
        return model in self._templates

    async def render(self, model: str, messages: Sequence[Message], add_generation_prompt: bool) -> tuple[str, Marks]:
        """The template's output with marks, for `encode_prompt`. Raises InvalidRequest."""
        template = self._templates.get(model)
        if template is None:
            raise InvalidRequest(f"the model {model!r} has no usable chat template", model=model)
        for index, message in enumerate(messages):
            if message["role"] not in template.roles:
                known = ", ".join(sorted(template.roles))
                raise InvalidRequest(
                    f"messages[{index}].role is not one that this model's template knows: {known}",
                    field=f"messages[{index}].role",
                )
        size = sum(len(text.encode()) for message in messages for text in message.values())
        if size > MAX_CHAT_BYTES:
            raise InvalidRequest(f"messages: {size} bytes together, at most {MAX_CHAT_BYTES} are allowed")
        if any(template.marks.nonce in text for message in messages for text in message.values()):
            raise InvalidRequest("messages: not allowed to contain the service's own marks", field="messages")
        return await self._sandbox.render(model, messages, add_generation_prompt), template.marks

    async def _prove(self, model: str, vocabulary: Vocabulary, marks: Marks) -> frozenset[str]:
        roles = set()
        for role in ROLES:
            for before in ((), ("user",), ("user", "assistant")):
                messages = [{"role": each, "content": _PROBE} for each in (*before, role)]
                try:
                    rendered = await self._sandbox.render(model, messages, role != "assistant")
                except InvalidRequest:
                    continue
                if restore(rendered, marks).count(_PROBE) == len(messages):
                    _compare(vocabulary, encode_prompt(vocabulary, rendered, marks))
                    roles.add(role)
                    break
        if "user" not in roles:
            raise InvalidRequest("the chat template renders no user message")
        return frozenset(roles)


def read_template(directory: Path, max_bytes: int) -> tuple[str | None, dict[str, str]]:
    """(template source or None, special tokens by variable name) of a directory or .gguf file.

    Raises UnusableTokenizer.
    """
    if directory.suffix == ".gguf":
        return _from_gguf(directory, max_bytes)
    config = _read_json(directory / "tokenizer_config.json", max_bytes)
    variables = {name: text for name in _SPECIAL_NAMES if (text := _token_text(config.get(name))) is not None}
    path = directory / "chat_template.jinja"
    if path.exists():
        if path.stat().st_size > max_bytes:
            raise UnusableTokenizer(f"{path}: more than {max_bytes} bytes")
        return path.read_text(encoding="utf-8"), variables
    template = config.get("chat_template")
    if isinstance(template, list):  # named templates
        by_name = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = by_name.get("default")
    return (template if isinstance(template, str) else None), variables


def _from_gguf(path: Path, max_bytes: int) -> tuple[str | None, dict[str, str]]:
    try:
        files = read_text_files(path)
    except CheckpointError as error:
        raise UnusableTokenizer(str(error)) from None
    if files.chat_template is not None and len(files.chat_template.encode()) > max_bytes:
        raise UnusableTokenizer(f"{path}: its chat template has more than {max_bytes} bytes")
    return files.chat_template, files.special_tokens


def _read_json(path: Path, max_bytes: int) -> dict[str, Any]:
    if not path.exists():
        return {}
    if path.stat().st_size > max_bytes:
        raise UnusableTokenizer(f"{path}: more than {max_bytes} bytes")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnusableTokenizer(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise UnusableTokenizer(f"{path}: not a JSON object")
    return value


def _token_text(value: object) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _compare(vocabulary: Vocabulary, prompt: Prompt) -> None:
    if prompt.token_ids != vocabulary.encode(prompt.text, parse_special=True):
        raise InvalidRequest("the chat template builds special tokens from parts, so they cannot be told from words")
