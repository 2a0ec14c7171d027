"""The process that runs chat templates, and nothing else: they are programs written by strangers.

Started by file name with `python -I`, so it sees neither the mesh's code nor its environment. Limits itself (address
space, CPU seconds, no files, no children, no core), then answers length-prefixed JSON frames on stdin and stdout until
stdin closes. The parent holds the clock and kills it when a render overruns.

What the template itself writes is told from what it was given by rewriting its source: every control token spelled in
the template's own text becomes an unguessable mark, so `<|user|>` in the output can only have come from a message.
Messages reach the template unchanged; trim, split, replace and every other filter work on them as usual.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import resource
import sys
from collections.abc import Callable, Mapping
from datetime import date
from typing import Any, BinaryIO

import jinja2.debug  # noqa: F401  # jinja2 imports it at the first error, when no file can be opened any more
from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

VARIABLES = frozenset({"messages", "add_generation_prompt", "bos_token", "eos_token", "pad_token", "unk_token"})
"""All that a template may be given. Nothing a caller sends can add to it."""

WRITING_FILTERS = frozenset({"default", "d", "join"})
"""Filters whose arguments end up in the output; those of others (replace, trim, …) are looked for in messages."""

WRITING_METHODS = frozenset({"format", "join"})
"""Methods of which the same is true."""


class Refused(Exception):
    """The template called raise_exception."""


class Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here it means nothing."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Renderer:
    """Compiled templates by name."""

    def __init__(self, today: str, max_output_bytes: int) -> None:
        self._max_output_bytes = max_output_bytes
        self._environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
        )
        self._environment.filters["tojson"] = _to_json
        day = date.fromisoformat(today)
        self._environment.globals.update(raise_exception=_refuse, strftime_now=lambda form: day.strftime(form))
        self._templates: dict[str, tuple[Template, dict[str, str], frozenset[str]]] = {}

    def load(self, name: str, source: str, marks: Mapping[str, str], variables: Mapping[str, str]) -> None:
        """Compiles `source` with control tokens (keys of `marks`) replaced by their marks."""
        tree = self._environment.parse(source)
        literals = frozenset(str(node.value) for node in tree.find_all(nodes.Const) if isinstance(node.value, str))
        substitute = _substitution(marks)
        _mark(tree, substitute)
        template = self._environment.from_string(tree)
        given = {key: substitute(value) for key, value in variables.items() if key in VARIABLES}
        self._templates[name] = (template, given, literals)

    def render(self, name: str, messages: list[dict[str, str]], add_generation_prompt: bool) -> dict[str, str]:
        """{"text": …} or {"error": kind, "message": public words}."""
        template, variables, literals = self._templates[name]
        pieces: list[str] = []
        total = 0
        try:
            for piece in template.generate(messages=messages, add_generation_prompt=add_generation_prompt, **variables):
                total += len(piece.encode())
                if total > self._max_output_bytes:
                    return {"error": "output", "message": ""}
                pieces.append(piece)
        except Refused as error:
            # Words the template put together may quote a message; only its own fixed words may reach a log.
            return {"error": "refused", "message": str(error) if str(error) in literals else ""}
        except MemoryError:
            return {"error": "memory", "message": ""}
        except Exception as error:  # anything may go wrong in a stranger's program
            return {"error": "failed", "message": type(error).__name__}
        return {"text": "".join(pieces)}


def main() -> None:
    """Serves frames: the first sets limits, then `load` and `render`."""
    inbox, outbox = sys.stdin.buffer, sys.stdout.buffer
    first = read_frame(inbox)
    if first is None:
        return
    renderer = Renderer(first["today"], first["max_output_bytes"])
    _warm_up()
    _limit(first["memory_bytes"])
    write_frame(outbox, {"ready": True})
    while (request := read_frame(inbox)) is not None:
        _allow_cpu(first["cpu_s"])
        if request["op"] == "load":
            try:
                renderer.load(request["name"], request["source"], request["marks"], request["variables"])
                answer = {"text": ""}
            except (TemplateError, RecursionError, MemoryError, ValueError, TypeError, AttributeError) as error:
                line = getattr(error, "lineno", None)
                answer = {"error": "failed", "message": f"{type(error).__name__}, line {line}"}
        else:
            answer = renderer.render(request["name"], request["messages"], request["add_generation_prompt"])
        write_frame(outbox, answer)


def read_frame(stream: BinaryIO) -> dict[str, Any] | None:
    """The next frame; None at the end."""
    header = stream.read(4)
    if len(header) < 4:
        return None
    value = json.loads(stream.read(int.from_bytes(header, "little")))
    return value if isinstance(value, dict) else None


def write_frame(stream: BinaryIO, value: Mapping[str, Any]) -> None:
    """Writes one frame: 4 bytes length, little-endian, and JSON."""
    data = json.dumps(value, ensure_ascii=False).encode(errors="replace")
    stream.write(len(data).to_bytes(4, "little") + data)
    stream.flush()


def _mark(node: nodes.Node, substitute: Callable[[str], str]) -> None:
    """Replaces control tokens in what the template writes, but not in what it only compares with or looks for."""
    if isinstance(node, nodes.TemplateData):
        node.data = substitute(node.data)
        return
    if isinstance(node, nodes.Const):
        if isinstance(node.value, str):
            node.value = substitute(node.value)
        return
    if isinstance(node, nodes.Compare | nodes.Test):
        return
    if isinstance(node, nodes.Filter) and node.name not in WRITING_FILTERS:
        if node.node is not None:
            _mark(node.node, substitute)
        return
    if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr):  # content.split('</think>')
        _mark(node.node.node, substitute)
        for argument in node.args if node.node.attr in WRITING_METHODS else ():
            _mark(argument, substitute)
        return
    if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Name) and node.node.name == "raise_exception":
        return
    if isinstance(node, nodes.Getitem):
        _mark(node.node, substitute)
        return
    if isinstance(node, nodes.Pair):
        _mark(node.value, substitute)
        return
    for child in node.iter_child_nodes():
        _mark(child, substitute)


def _substitution(marks: Mapping[str, str]) -> Callable[[str], str]:
    if not marks:
        return lambda text: text
    longest_first = sorted(marks, key=len, reverse=True)
    pattern = re.compile("|".join(re.escape(token) for token in longest_first))
    return lambda text: pattern.sub(lambda match: marks[match[0]], text)


def _refuse(message: object) -> None:
    raise Refused(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _warm_up() -> None:
    """Compiles and runs a little of everything, because Python loads codecs and modules late and by opening files."""
    renderer = Renderer("2000-01-01", 1 << 20)
    conversation = [{"role": "user", "content": "é"}]
    for source in (
        "{%- for m in messages -%}{{ 'a\\n\\u00e9' ~ m['content']|trim|tojson|upper|title|string|replace('a', 'b') }}"
        "{{ strftime_now('%d %b %Y') }}{%- endfor -%}",
        "{{ raise_exception('é') }}",
        "{{ messages.x.y }}{{ 1 / 0 }}",
        "{{ ().__class__.__base__ }}",
        "{% bad",
        "{{ 'x' * 2 ",
    ):
        with contextlib.suppress(TemplateError):
            renderer.load("warm-up", source, {"<a>": "<b>"}, {})
            renderer.render("warm-up", conversation, True)


def _limit(memory_bytes: int) -> None:
    limits = (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, 3),
    )
    for which, value in limits:
        resource.setrlimit(which, (value, value))


def _allow_cpu(seconds: float) -> None:
    """Renews the budget of CPU time: the last resort should the parent be gone or stopped."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(usage.ru_utime + usage.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


if __name__ == "__main__":
    main()
