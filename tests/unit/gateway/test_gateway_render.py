"""Events as OpenAI-style JSON: roles, finish reasons, usage and log-probabilities land where clients look for them."""

from __future__ import annotations

import json
from typing import Any

from services.gateway.events import Alternative, Delta, Event, Finished, TokenText, Usage
from services.gateway.rest.render import ChatRenderer, TextRenderer, sse

DIGEST = "sha256:00"
TOKEN = TokenText(5, b"\xc3", -0.5, (Alternative(5, b"\xc3", -0.5), Alternative(6, b"x", -1.5)), offset=0)
EVENTS: list[Event] = [
    Delta(DIGEST, 1, "b", ()),
    Delta(DIGEST, 0, "", (TOKEN,)),
    Delta(DIGEST, 0, "ö\n", (TokenText(7, b"\xb6\n", -0.1, (), offset=0),)),
    Finished(DIGEST, 0, "stop"),
    Finished(DIGEST, 1, "length"),
    Usage(DIGEST, 10, 4, 3),
]


def chat(scored: bool = False, usage: bool = False) -> ChatRenderer:
    return ChatRenderer("req-1f", "m", 99, scored=scored, include_usage=usage)


def chunks(renderer: ChatRenderer | TextRenderer) -> list[dict[str, Any]]:
    return [chunk for event in EVENTS for chunk in renderer.chunks(event)]


def test_the_role_comes_once_per_choice_and_first() -> None:
    """Only the first delta of a choice names the role; the last names the finish reason and has no content."""
    made = chunks(chat())
    for choice in (0, 1):
        mine = [piece for chunk in made for piece in chunk["choices"] if piece["index"] == choice]
        assert mine[0]["delta"]["role"] == "assistant"
        assert all("role" not in piece["delta"] for piece in mine[1:])
        assert [piece["finish_reason"] for piece in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1]["delta"] == {} and mine[-1]["finish_reason"] == ("stop", "length")[choice]
    assert {chunk["id"] for chunk in made} == {"chatcmpl-1f"}
    assert {chunk["system_fingerprint"] for chunk in made} == {DIGEST}


def test_usage_is_null_until_the_last_chunk_when_asked_for() -> None:
    """With include_usage one more chunk has the counts and no choices; without it no chunk speaks of usage."""
    made = chunks(chat(usage=True))
    assert all(chunk["usage"] is None for chunk in made[:-1])
    assert made[-1]["choices"] == []
    assert made[-1]["usage"] == {
        "prompt_tokens": 10,
        "completion_tokens": 3,
        "total_tokens": 13,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    assert all("usage" not in chunk for chunk in chunks(chat()))


def test_a_whole_answer_equals_its_stream() -> None:
    """Joined deltas are the whole message."""
    whole = chat().whole(EVENTS)
    assert [choice["message"]["content"] for choice in whole["choices"]] == ["ö\n", "b"]
    assert [choice["finish_reason"] for choice in whole["choices"]] == ["stop", "length"]
    assert whole["usage"]["total_tokens"] == 13 and whole["object"] == "chat.completion"
    pieces = [piece for chunk in chunks(chat()) for piece in chunk["choices"] if piece["index"] == 0]
    assert "".join(piece["delta"].get("content", "") for piece in pieces) == "ö\n"


def test_chat_logprobs_carry_bytes() -> None:
    """A token that is part of a character is told exactly by its bytes."""
    content = chat(scored=True).whole(EVENTS)["choices"][0]["logprobs"]["content"]
    assert [entry["bytes"] for entry in content] == [[0xC3], [0xB6, 10]]
    assert content[0]["top_logprobs"][1] == {"token": "x", "logprob": -1.5, "bytes": [120]}
    assert chat().whole(EVENTS)["choices"][0]["logprobs"] is None


def test_completion_logprobs_have_four_lists() -> None:
    """The older shape: tokens, their log-probabilities, the alternatives and the offsets, all of one length."""
    scores = TextRenderer("req-1", "m", 1, scored=True, include_usage=False).whole(EVENTS)["choices"][0]["logprobs"]
    assert scores["tokens"] == ["bytes:\\xc3", "bytes:\\xb6\\x0a"]
    assert scores["token_logprobs"] == [-0.5, -0.1]
    assert scores["top_logprobs"] == [{"bytes:\\xc3": -0.5, "x": -1.5}, {"bytes:\\xb6\\x0a": -0.1}]
    assert scores["text_offset"] == [0, 0]


def test_completion_alternatives_name_the_chosen_token() -> None:
    """The older shape always has the chosen token among the alternatives, in its place or after them."""
    drawn = TokenText(9, b"z", -4.0, (Alternative(5, b"a", -0.5), Alternative(6, b"b", -1.5)))
    likely = TokenText(5, b"a", -0.5, (Alternative(5, b"a", -0.5), Alternative(6, b"b", -1.5)))
    renderer = TextRenderer("req-1", "m", 1, scored=True, include_usage=False)
    (chunk,) = renderer.chunks(Delta(DIGEST, 0, "za", (drawn, likely)))
    top = chunk["choices"][0]["logprobs"]["top_logprobs"]
    assert [list(each.items()) for each in top] == [
        [("a", -0.5), ("b", -1.5), ("z", -4.0)],
        [("a", -0.5), ("b", -1.5)],
    ]


def test_an_event_is_one_line_of_data() -> None:
    """A line break in the text does not break the event stream."""
    raw = sse({"text": "a\nb\u2028"})
    assert raw.startswith(b"data: ") and raw.endswith(b"\n\n") and raw.count(b"\n") == 2
    assert json.loads(raw[6:]) == {"text": "a\nb\u2028"}
