"""The gRPC face of the tokenizer: protobuf in and out, and nothing else decided here but where work runs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import grpc
from autoglm.tokenizer.v1 import tokenizer_pb2 as pb
from autoglm.tokenizer.v1 import tokenizer_pb2_grpc
from opentelemetry import trace
from prometheus_client import Counter

from services.chassis import decoding
from services.chassis.errors import InvalidRequest, NotFound
from services.chassis.offload import Offload
from services.tokenizer.chats import Chats
from services.tokenizer.prompts import encode_prompt
from services.tokenizer.settings import TokenizerSettings
from services.tokenizer.vocabulary import Vocabulary

MAX_RESPONSE_IDS = 1 << 20
"""The responses' own bound on token_ids."""

PART_TOKENS, PART_BYTES = 8192, 1 << 19
"""A part of a vocabulary ends with either: far within what one message may hold."""

TOKENS = Counter("autoglm_tokenizer_tokens_total", "Tokens made from text or turned into text", ["method"])
tracer = trace.get_tracer("autoglm.tokenizer")

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
T = TypeVar("T")


class TokenizerServicer(tokenizer_pb2_grpc.TokenizerServiceServicer):
    """Pure functions of the loaded files."""

    def __init__(
        self, settings: TokenizerSettings, vocabularies: Mapping[str, Vocabulary], chats: Chats, offload: Offload
    ) -> None:
        self._settings, self._vocabularies, self._chats, self._offload = settings, vocabularies, chats, offload

    async def Encode(self, request: pb.EncodeRequest, context: Context) -> pb.EncodeResponse:
        vocabulary = self._vocabulary(request.model)
        with tracer.start_as_current_span("tokenizer.encode") as span:
            ids = await self._run(
                len(request.text),
                lambda: vocabulary.encode(
                    request.text, parse_special=request.parse_special_tokens, add_special=request.add_special_tokens
                ),
            )
            span.set_attributes({"gen_ai.request.model": request.model, "autoglm.tokens": len(ids)})
        _check_length(ids)
        TOKENS.labels("Encode").inc(len(ids))
        return pb.EncodeResponse(token_ids=ids, tokenizer_digest=vocabulary.digest)

    async def Decode(self, request: pb.DecodeRequest, context: Context) -> pb.DecodeResponse:
        vocabulary = self._vocabulary(request.model)
        ids = request.token_ids
        with tracer.start_as_current_span("tokenizer.decode") as span:
            span.set_attributes({"gen_ai.request.model": request.model, "autoglm.tokens": len(ids)})
            return await self._run(len(ids), lambda: self._decode(vocabulary, request))

    async def DecodeStream(
        self, request_iterator: AsyncIterator[pb.DecodeStreamRequest], context: Context
    ) -> AsyncIterator[pb.DecodeStreamResponse]:
        vocabulary: Vocabulary | None = None
        decoder: decoding.TextDecoder | None = None
        with_bytes, total = False, 0
        async for request in request_iterator:
            if vocabulary is None or decoder is None:
                if not request.model:
                    raise InvalidRequest("model: the first message of the stream must name it", field="model")
                vocabulary = self._vocabulary(request.model)
                decoder = decoding.TextDecoder(vocabulary, request.keep_special_tokens)
                with_bytes = request.with_token_bytes
                trace.get_current_span().set_attribute("gen_ai.request.model", request.model)
            ids = request.token_ids
            _check_known(vocabulary, ids)
            total += len(ids)
            TOKENS.labels("DecodeStream").inc(len(ids))
            yield pb.DecodeStreamResponse(
                text=decoder.push(ids), token_bytes=decoding.bytes_of(vocabulary, ids) if with_bytes else ()
            )
        if decoder is None:
            raise InvalidRequest("the stream is empty; its first message must name the model", field="model")
        trace.get_current_span().set_attribute("autoglm.tokens", total)
        yield pb.DecodeStreamResponse(text=decoder.finish())

    async def RenderChat(self, request: pb.RenderChatRequest, context: Context) -> pb.RenderChatResponse:
        vocabulary = self._vocabulary(request.model)
        messages = [
            {"role": message.role, "content": message.content, **({"name": message.name} if message.name else {})}
            for message in request.messages
        ]
        with tracer.start_as_current_span("tokenizer.render_chat") as span:
            rendered, marks = await self._chats.render(request.model, messages, request.add_generation_prompt)
            prompt = await self._run(len(rendered), lambda: encode_prompt(vocabulary, rendered, marks))
            span.set_attributes({"gen_ai.request.model": request.model, "autoglm.tokens": len(prompt.token_ids)})
        _check_length(prompt.token_ids)
        if len(prompt.text.encode()) > self._settings.template_output_bytes:
            raise InvalidRequest(f"the prompt is longer than {self._settings.template_output_bytes} bytes")
        TOKENS.labels("RenderChat").inc(len(prompt.token_ids))
        return pb.RenderChatResponse(text=prompt.text, token_ids=prompt.token_ids, tokenizer_digest=vocabulary.digest)

    async def GetVocabulary(
        self, request: pb.GetVocabularyRequest, context: Context
    ) -> AsyncIterator[pb.GetVocabularyResponse]:
        vocabulary = self._vocabulary(request.model)
        part, size = pb.GetVocabularyResponse(), 0
        for token_id, piece in enumerate(vocabulary.pieces):
            part.token_bytes.append(piece or b"")
            size += len(piece or b"")
            if piece is None:
                part.absent_ids.append(token_id)
            elif token_id in vocabulary.special_ids:
                part.special_ids.append(token_id)
            if len(part.token_bytes) == PART_TOKENS or size >= PART_BYTES or token_id + 1 == vocabulary.size:
                part.tokenizer_digest = vocabulary.digest
                part.drops_leading_space = vocabulary.drops_leading_space
                yield part
                part, size = pb.GetVocabularyResponse(), 0

    async def ListTokenizers(self, request: pb.ListTokenizersRequest, context: Context) -> pb.ListTokenizersResponse:
        return pb.ListTokenizersResponse(
            tokenizers=[
                pb.TokenizerInfo(
                    model=name,
                    tokenizer_digest=vocabulary.digest,
                    vocabulary_size=vocabulary.size,
                    has_chat_template=self._chats.has(name),
                )
                for name, vocabulary in self._vocabularies.items()
            ]
        )

    def _vocabulary(self, model: str) -> Vocabulary:
        vocabulary = self._vocabularies.get(model)
        if vocabulary is None:
            raise NotFound(f"no tokenizer is loaded for the model {model!r}", model=model)
        return vocabulary

    def _decode(self, vocabulary: Vocabulary, request: pb.DecodeRequest) -> pb.DecodeResponse:
        ids = request.token_ids
        _check_known(vocabulary, ids)
        pieces = decoding.bytes_of(vocabulary, ids)
        size, limit = sum(map(len, pieces)), self._settings.max_decoded_bytes
        text = decoding.decode(vocabulary, ids, request.keep_special_tokens) if size <= limit else ""
        if max(size, len(text.encode())) > limit:  # in the text, a stray byte becomes a character of three
            raise InvalidRequest(f"token_ids: the text is longer than {limit} bytes", field="token_ids", limit=limit)
        if not request.with_token_bytes:
            pieces = []
        TOKENS.labels("Decode").inc(len(ids))
        return pb.DecodeResponse(text=text, token_bytes=pieces, tokenizer_digest=vocabulary.digest)

    async def _run(self, size: int, work: Callable[[], T]) -> T:
        """Small work at once, large work in a thread."""
        return work() if size <= self._settings.offload_bytes else await self._offload(work)


def _check_known(vocabulary: Vocabulary, ids: Sequence[int]) -> None:
    if (unknown := decoding.unknown_id(vocabulary, ids)) is not None:
        raise InvalidRequest(
            f"token_ids: {unknown} is not in the vocabulary of {vocabulary.size} entries", field="token_ids"
        )


def _check_length(ids: Sequence[int]) -> None:
    if len(ids) > MAX_RESPONSE_IDS:
        raise InvalidRequest(f"the text has {len(ids)} tokens, at most {MAX_RESPONSE_IDS} are allowed")
