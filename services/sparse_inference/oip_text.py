"""Text generation over the Open Inference Protocol, with the tensors that users of vLLM on Triton know.

Ids in and ids out need nothing but the worker. A caller who brings text or wants text is served through the tokenizer
service, whose tokenizer must be the model's own. A generation is the worker's Generate, called in process: bounds,
fences, spans and counts are those of any other.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from autoglm.sparse_inference.v1 import sparse_inference_pb2 as worker_pb
from autoglm.third_party import oip_pb2 as pb
from autoglm.type.v1 import generation_pb2

from services.chassis.errors import InvalidRequest, Unavailable, WrongVariant
from services.sparse_inference import oip_sampling, oip_tensors
from services.sparse_inference.oip import FINAL, TIMEOUT, VERSION, Context
from services.sparse_inference.oip_settings import OipSettings
from services.sparse_inference.oip_tensors import Array

TEXT, IDS = "text_input", "input_ids"
TEXT_OUT, IDS_OUT = "text_output", "output_ids"
PARAMETERS = "sampling_parameters"
EXCLUDE = "exclude_input_in_output"
FLAGS = ("stream", "streaming", EXCLUDE, "return_finish_reason", "return_num_input_tokens", "return_num_output_tokens")
EXTRA = {
    "return_finish_reason": "finish_reason",
    "return_num_input_tokens": "num_input_tokens",
    "return_num_output_tokens": "num_output_tokens",
}
"""Flag → the output it adds."""
ID_TYPES = ("INT32", "INT64", "UINT32", "UINT64")
MAX_REQUEST_ID_BYTES = 64
MAX_IDS = 131_072
MAX_TEXT_BYTES = 1 << 20
"""The bounds of GenerateRequest.token_ids and EncodeRequest.text."""
PLATFORM = "autoglm"

_INPUTS = (
    (TEXT, "BYTES", (1,)), (IDS, "INT64", (1, -1)), (PARAMETERS, "BYTES", (1,)),
    *((name, "BOOL", (1,)) for name in FLAGS),
)  # fmt: skip
_OUTPUTS = (
    (TEXT_OUT, "BYTES", (1,)), (IDS_OUT, "INT64", (1, -1)), ("finish_reason", "BYTES", (1,)),
    ("num_input_tokens", "UINT32", (1,)), ("num_output_tokens", "UINT32", (1,)),
)  # fmt: skip
_REASONS = {
    generation_pb2.FINISH_REASON_STOP: "stop",
    generation_pb2.FINISH_REASON_LENGTH: "length",
    generation_pb2.FINISH_REASON_HANDED_OVER: "handed_over",
}

Generate = Callable[[worker_pb.GenerateRequest, Context], AsyncGenerator[worker_pb.GenerateResponse]]


class Decoder(Protocol):
    """Ids to text, as they come."""

    async def push(self, token_ids: Sequence[int]) -> str:
        """The text that became certain."""

    async def finish(self) -> str:
        """What was held back."""


class Texts(Protocol):
    """The tokenizer service."""

    async def encode(self, model: str, text: str) -> tuple[list[int], str]:
        """Ids and the tokenizer's digest."""

    def decoder(self, model: str) -> AbstractAsyncContextManager[Decoder]:
        """A stream of its own for one generation."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request, understood."""

    work: worker_pb.GenerateRequest
    outputs: tuple[str, ...]
    is_streamed: bool
    prefix_text: str = ""
    """The prompt, when the answer shall begin with it."""
    prefix_ids: tuple[int, ...] = ()


@dataclass(slots=True)
class _Part:
    """What one answer says."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: str = ""


class TextModel:
    """`oip.Model` for the language model of this worker."""

    in_order = False

    def __init__(
        self,
        settings: OipSettings,
        name: str,
        tokenizer_digest: str,
        is_draining: Callable[[], bool],
        generate: Generate,
        texts: Texts,
        new_seed: Callable[[], int],
        new_id: Callable[[], str],
    ) -> None:
        self.name = name
        self._settings, self._tokenizer_digest, self._is_draining = settings, tokenizer_digest, is_draining
        self._generate, self._texts, self._new_seed, self._new_id = generate, texts, new_seed, new_id

    @property
    def is_ready(self) -> bool:
        return not self._is_draining()

    def metadata(self) -> pb.ModelMetadataResponse:
        described = pb.ModelMetadataResponse(platform=PLATFORM)
        for tensors, known in ((described.inputs, _INPUTS), (described.outputs, _OUTPUTS)):
            for name, datatype, shape in known:
                tensors.add(name=name, datatype=datatype, shape=shape)
        return described

    async def infer(self, request: pb.ModelInferRequest, context: Context) -> pb.ModelInferResponse:
        asked = await self._understand(request)
        if asked.is_streamed:
            raise InvalidRequest("stream: one answer cannot stream; use ModelStreamInfer", field="stream")
        return await self._whole(request, asked, context)

    async def stream(
        self, request: pb.ModelInferRequest, context: Context
    ) -> AsyncGenerator[pb.ModelInferResponse, None]:
        asked = await self._understand(request)
        if not asked.is_streamed:
            yield _marked(await self._whole(request, asked, context), is_final=True)
            return
        async with aclosing(self._parts(asked, context)) as parts:
            async for part in parts:
                yield _marked(_answer(request, asked, part), is_final=bool(part.finish))

    async def _whole(self, request: pb.ModelInferRequest, asked: _Asked, context: Context) -> pb.ModelInferResponse:
        whole = _Part(list(asked.prefix_ids), asked.prefix_text)
        texts = [whole.text]
        async with aclosing(self._parts(asked, context)) as parts:
            async for part in parts:
                whole.token_ids += part.token_ids
                texts.append(part.text)
                whole.finish = part.finish
        whole.text = "".join(texts)
        return _answer(request, asked, whole)

    async def _parts(self, asked: _Asked, context: Context) -> AsyncGenerator[_Part, None]:
        async with AsyncExitStack() as stack:
            decoder: Decoder | None = None
            messages = await stack.enter_async_context(aclosing(self._generate(asked.work, context)))
            async for message in messages:
                if message.WhichOneof("event") == "finish":
                    text = await decoder.finish() if decoder else ""
                    yield _Part(text=text, finish=_REASONS[message.finish.reason])
                    return
                ids = list(message.chunk.token_ids)
                text = ""
                if TEXT_OUT in asked.outputs:
                    if decoder is None:
                        decoder = await stack.enter_async_context(self._texts.decoder(self.name))
                    text = await decoder.push(ids)
                yield _Part(ids, text)
        raise Unavailable("the generation ended without a finish")

    async def _understand(self, request: pb.ModelInferRequest) -> _Asked:
        for tensor in request.inputs:
            if math.prod(tensor.shape) > MAX_IDS:  # before anything of that size is made
                raise InvalidRequest(f"{tensor.name} has shape {list(tensor.shape)}, at most {MAX_IDS} elements")
        arrays = oip_tensors.arrays(request)
        given = {name: oip_tensors.parameter(value) for name, value in request.parameters.items() if name != TIMEOUT}
        for name in arrays:
            if name not in (TEXT, IDS, PARAMETERS, *FLAGS):
                known = ", ".join((TEXT, IDS, PARAMETERS, *FLAGS))
                raise InvalidRequest(f"input {name[:64]!r} is not known here; there are {known}", field=name)
        flags = {name: _flag(name, arrays, given) for name in FLAGS}
        is_streamed = bool(flags["stream"] or flags["streaming"])
        if (TEXT in arrays) == (IDS in arrays):
            raise InvalidRequest(f"give one of the inputs {TEXT} and {IDS}")
        outputs = _outputs(request, TEXT in arrays, flags)
        excludes = flags[EXCLUDE]
        if excludes is None:
            excludes = is_streamed or IDS in arrays
        if is_streamed and not excludes:
            raise InvalidRequest(f"{EXCLUDE} must be true when answers stream", field=EXCLUDE)
        values = {name: value for name, value in given.items() if not name.startswith("triton_")}
        if PARAMETERS in arrays:  # as vLLM's backend has it: the tensor replaces the parameters
            values = dict(oip_sampling.from_json(_element(PARAMETERS, arrays)))
        text = "" if TEXT not in arrays else _decoded(TEXT, arrays)
        ids = await self._ids(text, arrays, outputs)
        work = worker_pb.GenerateRequest(
            request_id=request.id if 0 < len(request.id.encode()) <= MAX_REQUEST_ID_BYTES else self._new_id(),
            model=self.name,
            tenant=self._settings.oip_tenant,
            max_tokens=self._settings.oip_max_tokens,
        )
        work.token_ids.extend(ids)
        work.sampling.seed = self._new_seed()
        oip_sampling.apply(values, work)
        prefix = ("", ()) if excludes else (text, tuple(ids))
        return _Asked(work, outputs, is_streamed, *prefix)

    async def _ids(self, text: str, arrays: Mapping[str, Array], outputs: Sequence[str]) -> list[int]:
        """The prompt's ids. Where text comes or goes, the tokenizer service must have the model's own tokenizer."""
        if IDS not in arrays and (size := len(text.encode())) > MAX_TEXT_BYTES:
            raise InvalidRequest(f"{TEXT}: {size} bytes, at most {MAX_TEXT_BYTES} are allowed", field=TEXT)
        ids: list[int] = []
        if IDS not in arrays or TEXT_OUT in outputs:
            ids, digest = await self._texts.encode(self.name, text)
            if digest != self._tokenizer_digest:
                raise WrongVariant(
                    f"the tokenizer service has {digest} for {self.name}, this worker needs {self._tokenizer_digest}"
                )
        return _given_ids(arrays[IDS]) if IDS in arrays else ids


def _given_ids(array: Array) -> list[int]:
    if array.dtype not in [oip_tensors.DTYPES[name] for name in ID_TYPES]:
        raise InvalidRequest(f"{IDS} must be one of {', '.join(ID_TYPES)}", field=IDS)
    if array.ndim not in (1, 2) or (array.ndim == 2 and array.shape[0] != 1):
        raise InvalidRequest(f"{IDS} has shape {list(array.shape)}, it takes [n] or [1, n]", field=IDS)
    flat = array.reshape(-1)
    if flat.size and (int(flat.min()) < 0 or int(flat.max()) >= 1 << 32):
        raise InvalidRequest(f"{IDS}: {int(flat.min())} … {int(flat.max())} are no token ids", field=IDS)
    ids: list[int] = flat.tolist()
    return ids


def _single(name: str, arrays: Mapping[str, Array]) -> Any:
    array = arrays[name]
    if array.size != 1:
        raise InvalidRequest(f"{name} has shape {list(array.shape)}, it takes one element", field=name)
    return array.reshape(-1)[0]


def _element(name: str, arrays: Mapping[str, Array]) -> bytes:
    element = _single(name, arrays)
    if not isinstance(element, bytes):
        raise InvalidRequest(f"{name} must be BYTES", field=name)
    return element


def _decoded(name: str, arrays: Mapping[str, Array]) -> str:
    _element(name, arrays)
    return str(oip_tensors.decoded(name, arrays[name]).reshape(-1)[0])


def _flag(name: str, arrays: Mapping[str, Array], given: dict[str, Any]) -> bool | None:
    """A truth value from the tensor or the parameter of that name; None without either."""
    value = given.pop(name, None)
    if name in arrays:
        if arrays[name].dtype != np.bool_:
            raise InvalidRequest(f"{name} must be BOOL", field=name)
        value = bool(_single(name, arrays))
    if value is not None and not isinstance(value, bool):
        raise InvalidRequest(f"{name} must be a truth value, not {str(value)[:32]!r}", field=name)
    return value


def _outputs(request: pb.ModelInferRequest, from_text: bool, flags: Mapping[str, bool | None]) -> tuple[str, ...]:
    known = [name for name, _, _ in _OUTPUTS]
    names = [wanted.name for wanted in request.outputs]
    for name in names:
        if name not in known:
            raise InvalidRequest(f"output {name[:64]!r} does not exist; there are {', '.join(known)}", field=name)
    names = names or [TEXT_OUT if from_text else IDS_OUT]
    names += [output for flag, output in EXTRA.items() if flags[flag] and output not in names]
    return tuple(names)


def _answer(request: pb.ModelInferRequest, asked: _Asked, part: _Part) -> pb.ModelInferResponse:
    made = len(part.token_ids) - len(asked.prefix_ids)
    tensors: dict[str, Callable[[], Array]] = {
        TEXT_OUT: lambda: oip_tensors.strings([part.text]),
        IDS_OUT: lambda: np.array([part.token_ids], np.int64),
        "finish_reason": lambda: oip_tensors.strings([part.finish]),
        "num_input_tokens": lambda: np.array([len(asked.work.token_ids)], np.uint32),
        "num_output_tokens": lambda: np.array([made], np.uint32),
    }
    return oip_tensors.answer(request, VERSION, [(name, tensors[name]()) for name in asked.outputs])


def _marked(answer: pb.ModelInferResponse, is_final: bool) -> pb.ModelInferResponse:
    answer.parameters[FINAL].bool_param = is_final
    return answer
