"""Streaming decode: parts join to the whole, and never end inside a character."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from services.chassis import decoding
from services.tokenizer import token_bytes, vocabulary

MODEL = Path("models/glm-tiny")
GLM = vocabulary.load(MODEL, 1 << 26)
REFERENCE = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
ids = st.lists(st.integers(0, GLM.size - 1), max_size=60)


def cut(values: list[int], places: list[int]) -> list[list[int]]:
    edges = [0, *sorted(place % (len(values) + 1) for place in places), len(values)]
    return [values[start:end] for start, end in itertools.pairwise(edges)]


@settings(max_examples=400, deadline=None)
@given(ids, st.lists(st.integers(0, 60), max_size=12), st.booleans())
def test_any_chunking_of_any_ids_joins_to_the_batch_text(values: list[int], places: list[int], keep: bool) -> None:
    """Whatever the ids and however they arrive, the parts equal Decode, and Decode equals the reference library."""
    decoder = decoding.TextDecoder(GLM, keep)
    parts = [decoder.push(chunk) for chunk in cut(values, places)]
    text = "".join(parts) + decoder.finish()
    assert text == decoding.decode(GLM, values, keep) == REFERENCE.decode(values, skip_special_tokens=not keep)
    if keep:
        assert b"".join(decoding.bytes_of(GLM, values)).decode(errors="replace") == text


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
def test_text_survives_and_no_part_holds_half_a_character(text: str) -> None:
    """Encode then token-by-token decode gives the text back; no part ever contains a replacement it did not have."""
    values = GLM.encode(text)
    decoder = decoding.TextDecoder(GLM, True)
    parts = [decoder.push([value]) for value in values]
    assert "".join(parts) == text
    assert decoder.finish() == ""
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts)


def test_a_character_cut_off_by_the_end_becomes_one_replacement() -> None:
    """Three of the four bytes of an emoji are held back, then flushed as U+FFFD."""
    table = {piece: number for number, piece in enumerate(GLM.pieces)}
    decoder = decoding.TextDecoder(GLM, False)
    assert [decoder.push([table[bytes([byte])]]) for byte in "😀".encode()[:3]] == ["", "", ""]
    assert decoder.finish() == "\ufffd"


@pytest.mark.parametrize(
    "text",
    ["\0", "\u202e evil \u202c", "e" + "\u0301" * 500, "👩‍👩‍👧‍👦", "\ufeff", "\u2028", "<|user|>", "ￚ", " \t\r\n"],
)
def test_awkward_text_survives(text: str) -> None:
    """NUL, bidi controls, towers of accents, joined emoji: lossless, token by token."""
    decoder = decoding.TextDecoder(GLM, True)
    assert "".join(decoder.push([number]) for number in GLM.encode(text)) + decoder.finish() == text


def test_cost_per_token_does_not_grow_with_the_stream() -> None:
    """The decoder keeps at most an unfinished character, however long the stream has been."""
    decoder = decoding.TextDecoder(GLM, True)
    for _ in range(2000):
        decoder.push([300, 301])
    held, _ = decoder._decoder.getstate()
    assert len(held) <= 3


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-fallback vocabulary in the manner of Llama 2."""
    directory = tmp_path_factory.mktemp("spm")
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "[INST]", *(f"<0x{byte:02X}>" for byte in range(256))]
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 5, trainer)
    source = json.loads(tokenizer.to_str())
    source["added_tokens"] = [token for token in source["added_tokens"] if not token["content"].startswith("<0x")]
    source["decoder"] = json.loads(
        json.dumps(
            {
                "type": "Sequence",
                "decoders": [
                    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                    {"type": "ByteFallback"},
                    {"type": "Fuse"},
                    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
                ],
            }
        )
    )
    (directory / "tokenizer.json").write_text(json.dumps(source))
    return directory


@pytest.mark.parametrize("text", ["the quick fox", "naïve 😀 dog", "  two spaces", "lazy"])
def test_byte_fallback_vocabularies_decode_like_the_reference(sentencepiece: Path, text: str) -> None:
    """▁ is a space, <0xNN> a byte, one leading space is dropped: the same text as the reference library's."""
    loaded = vocabulary.load(sentencepiece, 1 << 26)
    reference = Tokenizer.from_file(str(sentencepiece / "tokenizer.json"))
    values = loaded.encode(text)
    decoder = decoding.TextDecoder(loaded, True)
    assert "".join(decoder.push([value]) for value in values) + decoder.finish() == reference.decode(values)


def test_text_after_a_control_token_gets_no_second_prefix(sentencepiece: Path) -> None:
    """Runs between control tokens encode as they would inside the whole prompt."""
    loaded = vocabulary.load(sentencepiece, 1 << 26)
    whole = loaded.encode("the fox[INST]the dog", parse_special=True)
    middle = loaded.controls["[INST]"].token_id
    runs = [
        *loaded.encode_run("the fox", is_first=True),
        middle,
        *loaded.encode_run("the dog", is_first=False),
    ]
    assert runs == whole


def test_unknown_decoders_are_refused() -> None:
    """A vocabulary whose bytes we would have to guess does not load."""
    word_piece = json.loads(decoders.WordPiece().__getstate__())
    with pytest.raises(ValueError, match="not supported"):
        token_bytes.decoder_kind(word_piece)
