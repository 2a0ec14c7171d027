"""Starts the tokenizer service: loads every model's text files, then serves. `python -m services.tokenizer`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import uvloop
from autoglm.manifest import is_digest
from autoglm.tokenizer.v1 import tokenizer_pb2, tokenizer_pb2_grpc

from engine.checkpoints.digest_cache import default_cache_directory
from services.chassis import telemetry
from services.chassis.channels import connect
from services.chassis.model_fetch import CannotFetch, Terms, fetch
from services.chassis.offload import Offload
from services.chassis.progress import Reporter
from services.chassis.serving import Member
from services.chassis.settings import read
from services.tokenizer import vocabulary
from services.tokenizer.chats import Chats
from services.tokenizer.clients import ArtifactClient
from services.tokenizer.sandbox import Limits, Sandbox
from services.tokenizer.server import TokenizerServicer
from services.tokenizer.settings import TokenizerSettings


async def serve(settings: TokenizerSettings) -> None:
    member = Member("tokenizer", settings, [tokenizer_pb2.DESCRIPTOR.services_by_name["TokenizerService"].full_name])
    limits = Limits(
        time_s=settings.template_time_ms / 1000,
        start_s=settings.template_start_ms / 1000,
        memory_bytes=settings.template_memory_bytes,
        output_bytes=settings.template_output_bytes,
        today=settings.template_date,
    )
    sandbox = Sandbox(limits, settings.template_processes, settings.template_max_waiting)
    offload = Offload("tokenizer", settings.tokenizer_threads, settings.tokenizer_max_waiting)
    chats = Chats(sandbox)
    try:
        vocabularies: dict[str, vocabulary.Vocabulary] = {}
        tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server(
            TokenizerServicer(settings, vocabularies, chats, offload), member.server
        )
        await member.start()
        models = {
            name: (directory, vocabulary.load(directory, settings.max_tokenizer_file_bytes))
            for name, directory in (await _at_hand(settings)).items()
        }
        for model, reason in (await chats.start(models, settings.max_tokenizer_file_bytes)).items():
            telemetry.fallback("chat_template_off", model=model, reason=reason)
        vocabularies.update({name: loaded for name, (_, loaded) in models.items()})
        await member.ready()
        await member.run()
    finally:
        await sandbox.close()
        offload.close()


async def _at_hand(settings: TokenizerSettings) -> Mapping[str, Path]:
    """Model name → path; of models that are named by a digest, the text's files are fetched first."""
    found = dict(settings.directories)
    terms = Terms(settings.model_fetch_patience_s, settings.model_fetch_mib << 20, is_text, ".text")
    root = settings.cache_dir or default_cache_directory()
    for name, place in found.items():
        if is_digest(str(place)):
            channel = connect(settings, "cache")
            try:
                progress = Reporter(f"fetching the tokenizer of {name}")
                found[name] = await fetch(str(place), root, ArtifactClient(channel), terms, progress)
            finally:
                await channel.close(None)
    return found


def is_text(name: str) -> bool:
    """Whether a model's file may matter here: weights do not, but for a .gguf, which has its tokenizer inside."""
    return not name.endswith((".safetensors", ".onnx", ".onnx.data", ".onnx_data"))


def main() -> None:
    settings = read(TokenizerSettings)
    try:
        uvloop.run(serve(settings))
    except CannotFetch as error:
        print(f"AUTOGLM_MODELS: {error}", file=sys.stderr)
        raise SystemExit(2 if error.is_final else 1) from None
    except vocabulary.UnusableTokenizer as error:
        print(f"AUTOGLM_MODELS: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
