"""The options that several commands share, and the client they describe.

Values of None are left to the SDK, so that defaults are written in one place only.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from autoglm import Client, Tls
from autoglm.connection import DEFAULT_TIMEOUT_S

MAX_CONSTRAINT_BYTES = 65_536
MAX_STDIN_BYTES = 4 * 2**20
"""Most bytes read as one prompt from standard input; the mesh accepts 1 MiB."""

Prompt: TypeAlias = Annotated[str, typer.Argument(metavar="PROMPT|-", help="The text; - reads it from standard input.")]
Target: TypeAlias = Annotated[
    str | None, typer.Option(envvar="AUTOGLM_TARGET", help="host:port or URL of the mesh. Default: 127.0.0.1:8080.")
]
ModelName: TypeAlias = Annotated[
    str | None,
    typer.Option("--model", "-m", envvar="AUTOGLM_MODEL", help="Model to use. Default: the only one served."),
]
Timeout: TypeAlias = Annotated[float, typer.Option(help="Seconds to wait for the whole answer; 0 waits for ever.")]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="One JSON object per line.")]
TlsFlag: TypeAlias = Annotated[bool, typer.Option("--tls", help="Connect with TLS.")]
CaFile: TypeAlias = Annotated[
    Path | None, typer.Option("--ca", exists=True, dir_okay=False, help="PEM file of roots to trust; implies --tls.")
]
System: TypeAlias = Annotated[str | None, typer.Option(help="System message; turns the prompt into a chat.")]
MaxTokens: TypeAlias = Annotated[int | None, typer.Option("--max-tokens", help="Most tokens per answer.")]
Temperature: TypeAlias = Annotated[float | None, typer.Option(help="0 is greedy.")]
TopP: TypeAlias = Annotated[float | None, typer.Option(help="Nucleus: smallest set of tokens that reaches this sum.")]
TopK: TypeAlias = Annotated[int | None, typer.Option(help="Keep the k most likely tokens; 0 is off.")]
MinP: TypeAlias = Annotated[float | None, typer.Option(help="Drop tokens below this share of the most likely one.")]
Seed: TypeAlias = Annotated[int | None, typer.Option(help="Same seed, same tokens.")]
Stop: TypeAlias = Annotated[list[str] | None, typer.Option(help="A string that ends the text; may be given again.")]
PresencePenalty: TypeAlias = Annotated[float | None, typer.Option(help="Against tokens already used, once.")]
FrequencyPenalty: TypeAlias = Annotated[float | None, typer.Option(help="Against tokens already used, each time.")]
RepetitionPenalty: TypeAlias = Annotated[float | None, typer.Option(help="Against tokens of prompt and answer.")]
MinTokens: TypeAlias = Annotated[int | None, typer.Option("--min-tokens", help="Fewest tokens of an answer.")]
JsonSchema: TypeAlias = Annotated[
    str | None, typer.Option("--json-schema", help="JSON schema the answer must keep, or @FILE.")
]
Regex: TypeAlias = Annotated[str | None, typer.Option(help="Regular expression the answer must match, or @FILE.")]
Grammar: TypeAlias = Annotated[str | None, typer.Option(help="Lark or GBNF grammar of the answer, or @FILE.")]
RunDirectories: TypeAlias = Annotated[
    list[Path] | None,
    typer.Option("--run-dir", help="Run directory of a mesh; may be given again. Default: .run and .run/clouds/*."),
]

TIMEOUT_S = DEFAULT_TIMEOUT_S


def open_client(target: str | None, model: str | None, timeout: float, tls: bool, ca: Path | None) -> Client:
    """The client the options describe."""
    trust: Tls | bool = Tls(ca_pem=ca.read_bytes()) if ca is not None else tls
    return Client(target, tls=trust, model=model, timeout=timeout if timeout else None)


def read_constraint(value: str | None) -> str | None:
    """The text itself, or the content of FILE for "@FILE"."""
    if value is None or not value.startswith("@"):
        return value
    try:
        with Path(value[1:]).open("rb") as file:
            data = file.read(MAX_CONSTRAINT_BYTES + 1)
        if len(data) > MAX_CONSTRAINT_BYTES:
            raise typer.BadParameter(f"{value[1:]} is longer than {MAX_CONSTRAINT_BYTES} bytes")
        return data.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{value[1:]}: {error}") from None


def read_prompt(prompt: str) -> str:
    """The prompt itself, or all of standard input for "-"."""
    if prompt != "-":
        return prompt
    data = sys.stdin.buffer.read(MAX_STDIN_BYTES + 1)
    if len(data) > MAX_STDIN_BYTES:
        raise typer.BadParameter(f"standard input is longer than {MAX_STDIN_BYTES} bytes", param_hint="PROMPT")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"standard input is not UTF-8 (byte {error.start})", param_hint="PROMPT") from None
