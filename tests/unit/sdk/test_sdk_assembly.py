"""A stream is whole only when every choice has finished and the usage has come."""

from __future__ import annotations

import pytest
from autoglm import Finish, InternalError, InterruptedStreamError
from autoglm.assembly import Assembly
from autoglm.gateway.v1 import gateway_pb2
from autoglm.type.v1 import generation_pb2

from tests.fakes.fake_gateway import DIGEST, delta, finish, usage


def feed(*responses: gateway_pb2.GenerateResponse, choices: int = 1, max_bytes: int = 10**6) -> Assembly:
    assembly = Assembly(choices, max_bytes)
    for response in responses:
        assembly.take(response)
    return assembly


def test_a_whole_stream_becomes_a_completion() -> None:
    """Interleaved choices come out apart and in order, with ids, digest and counts."""
    assembly = feed(delta("b", 1), delta("a"), delta("B", 1), finish("length", 1), finish(stop="X"), usage(), choices=2)
    completion = assembly.completion("m", assembly.done())
    assert [(choice.text, choice.finish_reason, choice.stop) for choice in completion.choices] == [
        ("a", "stop", "X"),
        ("bB", "length", None),
    ]
    assert (completion.text, completion.variant_digest, completion.usage.total_tokens) == ("a", DIGEST, 5)


@pytest.mark.parametrize(
    "responses",
    [(), (delta("a"),), (delta("a"), finish()), (delta("a"), usage()), (finish(choice=1), usage())],
)
def test_a_cut_stream_is_an_interruption(responses: tuple[gateway_pb2.GenerateResponse, ...]) -> None:
    """Nothing short of every finish and the usage passes for an answer."""
    with pytest.raises(InterruptedStreamError):
        feed(*responses, choices=2).done()


def test_an_empty_answer_is_an_answer() -> None:
    """A model may end at once."""
    assembly = feed(finish(), usage())
    assert assembly.completion("m", assembly.done()).text == ""


def test_a_hand_over_is_not_an_end() -> None:
    """A worker's "continue elsewhere" that leaks to the client is an interruption, not a short answer."""
    leaked = gateway_pb2.ChoiceFinish(reason=generation_pb2.FINISH_REASON_HANDED_OVER)
    with pytest.raises(InterruptedStreamError):
        feed(delta("a"), gateway_pb2.GenerateResponse(finish=leaked))


def test_a_newer_gateway_is_understood() -> None:
    """Unknown reasons read as `other`, unknown events as none."""
    newer = gateway_pb2.ChoiceFinish()
    newer.MergeFromString(b"\x10\x63")  # reason = 99
    assert Assembly(1, 10**6).take(gateway_pb2.GenerateResponse(finish=newer)) == Finish("other")
    assert Assembly(1, 10**6).take(gateway_pb2.GenerateResponse(request_id="r")) is None


@pytest.mark.parametrize("responses", [(delta("a", 5),), (finish(), delta("a")), (finish(), finish())])
def test_a_broken_contract_is_named(responses: tuple[gateway_pb2.GenerateResponse, ...]) -> None:
    """Choices nobody asked for, and text after the end, are the gateway's bug."""
    with pytest.raises(InternalError):
        feed(*responses)


def test_memory_is_bounded() -> None:
    """An endless stream ends at the limit; what had come is kept."""
    assembly = Assembly(1, max_bytes=10_000)
    with pytest.raises(InterruptedStreamError, match="max_answer_bytes"):
        for _ in range(100):
            assembly.take(delta("x" * 1000))
    assert 0 < len(assembly.choices()[0].text) <= 10_000


def test_a_huge_number_of_choices_costs_nothing() -> None:
    """The client does not allocate for what the mesh will refuse."""
    assert Assembly(2**32 - 1, 100).choices() == ()
