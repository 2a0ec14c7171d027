"""A model whose head has more rows than its tokenizer has tokens: a real worker and the real tokenizer agree on ids."""

from __future__ import annotations

import json
from pathlib import Path

import grpc
import pytest

pytest.importorskip("autoglm_kernels", reason="the kernels are not compiled: run `make test`")
pytest.importorskip("transformers", reason="transformers is not installed: run `make test`")

from autoglm.sparse_inference.v1 import sparse_inference_pb2 as pb
from autoglm.sparse_inference.v1 import sparse_inference_pb2_grpc as rpc
from autoglm.type.v1 import generation_pb2

from engine.checkpoints.export_gguf import export_gguf
from engine.checkpoints.known_tokens import KnownTokens, known_tokens
from engine.checkpoints.opening import open_checkpoint
from services.chassis import decoding
from services.tokenizer import vocabulary
from tests.fakes.checkpoints import SMALLEST_VOCABULARY, write_checkpoint, write_tokenizer
from tests.fakes.processes import running

ROWS, HOLE = 1000, SMALLEST_VOCABULARY + 5
TOKENS = SMALLEST_VOCABULARY + 10
HOT = generation_pb2.SamplingParams(temperature=2.0, seed=7)


def ask(token_ids: list[int], **fields: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(request_id="r", tenant="t", token_ids=token_ids, **fields)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("padded") / "model"
    write_checkpoint(path, "qwen2", vocab_size=ROWS)
    write_tokenizer(path, TOKENS)
    source = json.loads((path / "tokenizer.json").read_text())
    source["model"]["vocab"] = {text: i for text, i in source["model"]["vocab"].items() if i != HOLE}
    (path / "tokenizer.json").write_text(json.dumps(source))
    return path


@pytest.fixture(scope="module", params=["hf", "gguf"])
def model(request: pytest.FixtureRequest, directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory, or the file that it exports to."""
    if request.param == "hf":
        return directory
    path = tmp_path_factory.mktemp("padded-gguf") / "model.gguf"
    export_gguf(open_checkpoint(directory), directory, path, "F32", lambda done, total: None)
    return path


async def test_ids_without_a_token_are_never_drawn_nor_taken(model: Path, tmp_path: Path) -> None:
    """Nearly all rows have no token, yet every token drawn has its text, and an id without one is refused by name."""
    arch = open_checkpoint(model).architecture
    assert arch.vocab_size == ROWS
    assert known_tokens(model, ROWS, arch.end_token_ids) == KnownTokens(TOKENS, frozenset({HOLE}))
    with running(
        "services.sparse_inference",
        AUTOGLM_MESH_ADDRESS="127.0.0.1:1",
        AUTOGLM_MODEL_DIR=str(model),
        AUTOGLM_MODEL_NAME="padded",
        AUTOGLM_CACHE_DIR=str(tmp_path),
    ) as service:
        async with grpc.aio.insecure_channel(service.address) as channel:
            stub = rpc.SparseInferenceServiceStub(channel)
            asked = ask([5, 6, 7], max_tokens=128, sampling=HOT, ignore_eos=True, logprobs=True, top_logprobs=20)
            messages = [message async for message in stub.Generate(asked)]
            refusals = []
            for unknown in (HOLE, TOKENS, ROWS - 1):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    async for _ in stub.Generate(ask([5, unknown], max_tokens=1)):
                        pass
                refusals.append((caught.value.code(), caught.value.details() or ""))
    chunks = [message.chunk for message in messages if message.HasField("chunk")]
    drawn = [token for chunk in chunks for token in chunk.token_ids]
    told = [other.token_id for chunk in chunks for entry in chunk.logprobs for other in entry.top]
    words = vocabulary.load(model, 1 << 20)
    assert len(drawn) == 128 and messages[-1].finish.reason == generation_pb2.FINISH_REASON_LENGTH
    assert decoding.unknown_id(words, [*drawn, *told]) is None
    assert decoding.decode(words, drawn, keep_special=True)
    for unknown, (code, text) in zip((HOLE, TOKENS, ROWS - 1), refusals, strict=True):
        assert code is grpc.StatusCode.INVALID_ARGUMENT and str(unknown) in text
