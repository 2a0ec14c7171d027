"""The commands of `autoglm`, and the one place that turns failures into exit codes."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Annotated

import typer

from autoglm import (
    AutoglmError,
    CallCancelledError,
    DeadlineError,
    GenerateOptions,
    InterruptedStreamError,
    Message,
    RefusedError,
    TooBusyError,
    UnavailableError,
)
from autoglm.cli import chat as chatting
from autoglm.cli import model as modelling
from autoglm.cli import options as opt
from autoglm.cli import status as statuses
from autoglm.cli import top as watching
from autoglm.cli import trace as tracing
from autoglm.cli.answers import show
from autoglm.cli.mesh import hand_over
from autoglm.cli.output import Output, ReaderGone
from autoglm.connection import version

EXIT_CODES = """Exit codes: 0 ok · 1 a bug on the other side · 2 wrong usage · 3 unavailable, too busy or out of time ·
4 request refused · 5 the answer broke off · 130 Ctrl-C · 141 the reader of the output went away."""
REFUSED, UNAVAILABLE, INTERRUPTED, READER_GONE = 4, 3, 5, 141

app = typer.Typer(
    name="autoglm",
    help="Talk to Open-AutoGLM Mesh.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(modelling.app, name="model")


def run() -> int:
    """Runs the command line and returns its exit code."""
    as_json = "--json" in sys.argv[1:]
    try:
        try:
            app(prog_name="autoglm")
        except AutoglmError as error:
            Output(as_json).failure(error)
            return exit_code(error)
        except SystemExit as ended:
            return ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 2
        return 0
    except ReaderGone:
        # Python would try to flush the closed pipe once more on its way out, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE


def exit_code(error: AutoglmError) -> int:
    """The code of `EXIT_CODES` for a failure."""
    if isinstance(error, RefusedError):
        return REFUSED
    if isinstance(error, InterruptedStreamError | CallCancelledError) or error.partial:
        return INTERRUPTED
    if isinstance(error, UnavailableError | TooBusyError | DeadlineError):
        return UNAVAILABLE
    return 1


def _tell_version(is_asked: bool) -> None:
    if is_asked:
        Output(as_json=False).write(f"{version()}\n")
        raise typer.Exit


@app.callback()
def main(
    _: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Talk to Open-AutoGLM Mesh."""


@app.command(epilog=EXIT_CODES)
def generate(
    prompt: opt.Prompt,
    target: opt.Target = None,
    model: opt.ModelName = None,
    system: opt.System = None,
    chat: Annotated[bool, typer.Option("--chat", help="Answer the prompt as a chat instead of continuing it.")] = False,
    max_tokens: opt.MaxTokens = None,
    temperature: opt.Temperature = None,
    top_p: opt.TopP = None,
    top_k: opt.TopK = None,
    min_p: opt.MinP = None,
    seed: opt.Seed = None,
    stop: opt.Stop = None,
    n: Annotated[int | None, typer.Option("-n", help="Number of answers.")] = None,
    logprobs: Annotated[bool, typer.Option("--logprobs", help="Report tokens; needs --json.")] = False,
    top_logprobs: Annotated[int | None, typer.Option(help="Alternatives per token; needs --json.")] = None,
    presence_penalty: opt.PresencePenalty = None,
    frequency_penalty: opt.FrequencyPenalty = None,
    repetition_penalty: opt.RepetitionPenalty = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past end-of-sequence tokens.")] = False,
    min_tokens: opt.MinTokens = None,
    json_schema: opt.JsonSchema = None,
    regex: opt.Regex = None,
    grammar: opt.Grammar = None,
    timeout: opt.Timeout = opt.TIMEOUT_S,
    tls: opt.TlsFlag = False,
    ca: opt.CaFile = None,
    json: opt.Json = False,
) -> None:
    """Continue a text, or answer it with --chat. Text is written as it comes."""
    if (logprobs or top_logprobs) and not json:
        raise typer.BadParameter("tokens are only shown with --json", param_hint="--logprobs")
    output = Output(json)
    text = opt.read_prompt(prompt)
    options: GenerateOptions = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "seed": seed,
        "stop": stop,
        "n": n,
        "logprobs": logprobs,
        "top_logprobs": top_logprobs,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "repetition_penalty": repetition_penalty,
        "ignore_eos": ignore_eos,
        "min_tokens": min_tokens,
        "json_schema": opt.read_constraint(json_schema),
        "regex": opt.read_constraint(regex),
        "grammar": opt.read_constraint(grammar),
    }
    messages = None
    if chat or system is not None:
        messages = [*([Message("system", system)] if system else []), Message("user", text)]
    with (
        opt.open_client(target, model, timeout, tls, ca) as client,
        client.stream(text if messages is None else None, messages=messages, **options) as stream,
    ):
        for _ in show(stream, output, choices=n or 1):
            pass


@app.command(epilog=EXIT_CODES)
def chat(
    target: opt.Target = None,
    model: opt.ModelName = None,
    system: opt.System = None,
    max_tokens: opt.MaxTokens = None,
    temperature: opt.Temperature = None,
    top_p: opt.TopP = None,
    top_k: opt.TopK = None,
    min_p: opt.MinP = None,
    seed: opt.Seed = None,
    stop: opt.Stop = None,
    timeout: opt.Timeout = opt.TIMEOUT_S,
    tls: opt.TlsFlag = False,
    ca: opt.CaFile = None,
    json: opt.Json = False,
) -> None:
    """Hold a conversation. Commands: /reset, /system TEXT, /quit. From a pipe each line is one turn."""
    options: GenerateOptions = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "seed": seed,
        "stop": stop,
    }
    with opt.open_client(target, model, timeout, tls, ca) as client:
        chatting.talk(client, Output(json), system, options)


@app.command(epilog=EXIT_CODES)
def models(
    target: opt.Target = None,
    timeout: opt.Timeout = opt.TIMEOUT_S,
    tls: opt.TlsFlag = False,
    ca: opt.CaFile = None,
    json: opt.Json = False,
) -> None:
    """List the models that can be asked for."""
    with opt.open_client(target, None, timeout, tls, ca) as client:
        served = client.models()
    Output(json).rows(
        ("name", "context_tokens", "parameters", "variant_digest"),
        [(model.name, model.context_tokens, model.parameters, model.variant_digest) for model in served],
    )


@app.command(epilog=EXIT_CODES)
def count(
    prompt: opt.Prompt,
    target: opt.Target = None,
    model: opt.ModelName = None,
    timeout: opt.Timeout = opt.TIMEOUT_S,
    tls: opt.TlsFlag = False,
    ca: opt.CaFile = None,
    json: opt.Json = False,
) -> None:
    """Count the tokens of a prompt."""
    text = opt.read_prompt(prompt)
    with opt.open_client(target, model, timeout, tls, ca) as client:
        counted = client.count_tokens(text)
    output = Output(json)
    if json:
        output.record({"tokens": counted.tokens, "tokenizer_digest": counted.tokenizer_digest})
    else:
        output.write(f"{counted.tokens}\n")


@app.command(epilog=EXIT_CODES)
def status(
    target: opt.Target = None,
    admin: Annotated[str | None, typer.Option(help="Envoy admin address, such as 127.0.0.1:15000.")] = None,
    tls: opt.TlsFlag = False,
    ca: opt.CaFile = None,
    json: opt.Json = False,
) -> None:
    """Say whether the mesh answers, how fast, and with which models. Exit code 3 when a request would fail."""
    output = Output(json)
    with output.waiting("asking"), opt.open_client(target, None, opt.TIMEOUT_S, tls, ca) as client:
        report = statuses.inspect(client, admin)
    latency_ms = None if report.latency_s is None else round(report.latency_s * 1000, 1)
    if json:
        served = [
            {"name": model.name, "variant_digest": model.variant_digest, "context_tokens": model.context_tokens}
            for model in report.models
        ]
        facts = {"target": report.target, "health": report.health, "latency_ms": latency_ms, "models": served}
        output.record(facts | {"proxy": dict(report.proxy), "error": report.error and report.error.message})
    else:
        lines: list[tuple[str, object]] = [("target", report.target), ("health", report.health)]
        lines += [] if latency_ms is None else [("latency", f"{latency_ms} ms")]
        lines += [(f"model {model.name}", model.variant_digest) for model in report.models]
        lines += report.proxy
        lines += [] if report.error is None else [("error", report.error.message)]
        output.rows(("what", "seen"), lines)
    if not report.is_good:
        raise typer.Exit(UNAVAILABLE if report.error is None else exit_code(report.error))


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def mesh(context: typer.Context) -> None:
    """Operate the mesh of this repository: diff, explain, check, status … (autoglm mesh --help lists them)."""
    raise typer.Exit(hand_over(context.args))


@app.command(epilog=EXIT_CODES)
def trace(
    which: Annotated[str, typer.Argument(metavar="ID", help="A trace id or a request id, or `last`.")],
    run_dir: opt.RunDirectories = None,
    traces: Annotated[str | None, typer.Option(help="Address of a trace sink, instead of the meshes' own.")] = None,
    json: opt.Json = False,
) -> None:
    """Show one request's way through the mesh as a tree, with what the proxies logged of it."""
    tracing.show(which, run_dir or [], traces, Output(json))


@app.command(epilog=EXIT_CODES)
def top(
    run_dir: opt.RunDirectories = None,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Show once and end, as it also does in a pipe.")] = False,
    json: opt.Json = False,
) -> None:
    """Watch the meshes of this machine: clouds, workers, tokens, queues, caches, weights, latencies."""
    with suppress(KeyboardInterrupt):
        watching.run(run_dir or [], interval, once, Output(json))
