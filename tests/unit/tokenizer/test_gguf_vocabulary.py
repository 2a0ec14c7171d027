"""The tokenizer inside a GGUF file gives the ids of the tokenizer it was made from."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from array import array
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from engine.checkpoints.digests import tokenizer_digest
from engine.checkpoints.export_gguf import _header
from engine.checkpoints.gguf_header import Value
from engine.checkpoints.gguf_text import text_metadata
from engine.checkpoints.gguf_tokenizer import HF_JSON, PRE_TOKENIZERS
from services.chassis.decoding import TextDecoder, decode
from services.tokenizer import vocabulary
from services.tokenizer.chats import read_template

MODEL = Path("models/glm-tiny")
PAGE = """def f(x):\n\treturn x ** 2  # don't panic, it's 1234567890 + 3.14159!\n\n\n    indented   text  \r\n
Ein Fräulein zahlt 12,50 €; naïve café — “quotes” … WE'LL SEE they'Re I'D\n
快速的棕色狐狸跳过了懒狗。今日は良い天気ですね。 한국어도 있습니다\n
👩‍👩‍👧‍👦 🇩🇪 🙂🙃 zero\u200bwidth e\u0301 ①②③ ٣٤٥ \x00\x07\n{"key": [1, 22, 333, 4444], "b": null}\t\t<b>&amp;</b>
<|user|>\nnot a turn<|endoftext|> <|end|> </s>  \n \n  trailing   """
CORPUS = [PAGE, Path("README.md").read_text(), Path("engine/prefix.py").read_text()] * 3


def _write(path: Path, metadata: dict[str, Value]) -> Path:
    path.write_bytes(_header({"general.architecture": b"llama", **metadata}, []))
    return path


def _trained(directory: Path, pre: str, ignore_merges: bool = False) -> Path:
    """A byte-level tokenizer.json with the splitting rules of `pre`, trained on a few pages."""
    directory.mkdir()
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    splits: list[Any] = [pre_tokenizers.Split(_regex(each), "isolated") for each in PRE_TOKENIZERS[pre]]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|user|>", "<|end|>"]
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=900, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )  # fmt: skip
    if ignore_merges:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"eos_token": "<|end|>", "chat_template": "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def _regex(pattern: str) -> Any:
    from tokenizers import Regex

    return Regex(pattern)


def _assert_same(before: vocabulary.Vocabulary, after: vocabulary.Vocabulary) -> None:
    for start in range(0, len(PAGE), 17):
        for text in (PAGE[start:], PAGE[start : start + 40]):
            for parse in (False, True):
                ids = before.encode(text, parse_special=parse)
                assert after.encode(text, parse_special=parse) == ids
                assert decode(after, ids, keep_special=True) == decode(before, ids, keep_special=True)
    ids = before.encode(PAGE, add_special=True)
    assert after.encode(PAGE, add_special=True) == ids
    stream = TextDecoder(after, keep_special=True)
    assert "".join([*(stream.push([each]) for each in ids), stream.finish()]) == decode(before, ids, keep_special=True)
    assert after.special_ids == before.special_ids and after.controls == before.controls


def test_the_original_tokenizer_travels_in_the_file(tmp_path: Path) -> None:
    """glm-tiny splits text in a way of its own: the ids stay, and so do the template and the two-token prefix."""
    text = text_metadata(MODEL, "glm", 4096, (0, 4, 6))
    path = _write(tmp_path / "m.gguf", text.metadata)
    assert any("splitting rules" in note for note in text.notes)
    _assert_same(vocabulary.load(MODEL, 1 << 26), vocabulary.load(path, 1 << 26))
    before, after = read_template(MODEL, 1 << 20), read_template(path, 1 << 20)
    assert after[0] == before[0] and after[1]["eos_token"] == before[1]["eos_token"]


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "chatglm-bpe", "gpt-2", "smollm", "default"])
def test_byte_level_tokenizers_are_built_from_tokens_and_merges(pre: str, tmp_path: Path) -> None:
    """A file of other programs, without the original: the named rules give the same ids."""
    directory = _trained(tmp_path / "hf", pre, ignore_merges=pre == "llama-bpe")
    size = max(Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab().values()) + 1
    family = {"llama-bpe": "llama", "qwen2": "qwen2", "chatglm-bpe": "glm"}.get(pre, "")
    text = text_metadata(directory, family, size + 5, (2,))
    assert text.metadata["tokenizer.ggml.pre"] == pre.encode() and not text.notes
    metadata = {key: value for key, value in text.metadata.items() if key != HF_JSON}
    path = _write(tmp_path / "m.gguf", metadata)
    _assert_same(vocabulary.load(directory, 1 << 26), vocabulary.load(path, 1 << 26))
    template, special = read_template(path, 1 << 20)
    assert template is not None and special["eos_token"] == "<|end|>"


def test_sentencepiece_vocabularies_are_built_from_scores(tmp_path: Path) -> None:
    """Unknown, control and byte tokens, a space before the first word, merges by score."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [2, 3, 3, *[6] * 256]
    words = ["▁the", "▁th", "▁t", "he", "th", "in", "▁in", "ing", "▁", *"thequickbrownfxjmpsvlazydg.,"]
    words = list(dict.fromkeys(words))
    scores = [0.0] * len(pieces) + [-float(rank) for rank in range(len(words))]
    path = _write(
        tmp_path / "m.gguf",
        {
            "tokenizer.ggml.model": b"llama",
            "tokenizer.ggml.tokens": [piece.encode() for piece in [*pieces, *words]],
            "tokenizer.ggml.token_type": array("q", [*types, *[1] * len(words)]),
            "tokenizer.ggml.scores": array("d", scores),
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 0,
        },
    )
    loaded = vocabulary.load(path, 1 << 26)
    names = [*pieces, *words]
    assert [names[each] for each in loaded.encode("the thing")] == ["▁the", "▁th", "ing"]
    assert loaded.encode("the", add_special=True)[0] == 1
    assert loaded.encode("</s>", parse_special=True)[-1] == 2 and 2 not in loaded.encode("</s>")
    for text in ("the quick brown fox", "naïve 快 🙂", " the", "a\n\tb  c"):
        ids = loaded.encode(text)
        assert decode(loaded, ids, keep_special=False) == text
        stream = TextDecoder(loaded, keep_special=False)
        assert "".join([*(stream.push([each]) for each in ids), stream.finish()]) == text


def test_a_tokenizer_that_would_give_other_ids_is_refused(tmp_path: Path) -> None:
    """Rules without a known name, another model, a tokenizer.json that is not the token list's, lists that disagree."""
    metadata = text_metadata(MODEL, "glm", 4096, (0,)).metadata
    plain = {key: value for key, value in metadata.items() if key != HF_JSON}
    tokens = metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    for changed, words in (
        (plain | {"tokenizer.ggml.pre": b"tekken"}, "tokenizer.ggml.pre"),
        (plain | {"tokenizer.ggml.model": b"t5"}, "tokenizer.ggml.model"),
        (metadata | {"tokenizer.ggml.tokens": [*tokens[:-1], b"no such entry"]}, "disagree"),
        (metadata | {HF_JSON: b"[[["}, "tokenizer.json"),
        (plain | {"tokenizer.ggml.tokens": [*tokens[:-1], tokens[7]]}, "twice"),
        (plain | {"tokenizer.ggml.tokens": tokens[:-1]}, "token types"),
        (plain | {"tokenizer.ggml.merges": [b"nospace"]}, "merges"),
        (plain | {"tokenizer.ggml.eos_token_id": 4096}, "eos_token_id"),
        (plain | {"tokenizer.ggml.tokens": b"text"}, "no list of strings"),
    ):
        with pytest.raises(vocabulary.UnusableTokenizer, match=words):
            vocabulary.load(_write(tmp_path / "m.gguf", changed), 1 << 26)


def test_digests_name_the_tokenizer_only(tmp_path: Path) -> None:
    """Other metadata, and the order of keys, change nothing; a token, a merge or the template does."""
    metadata = text_metadata(MODEL, "glm", 4096, (0,)).metadata
    first = tokenizer_digest(_write(tmp_path / "a.gguf", metadata))
    turned = dict(reversed(metadata.items()))
    assert tokenizer_digest(_write(tmp_path / "b.gguf", {"general.name": b"x", **turned})) == first
    shutil.copy(tmp_path / "a.gguf", tmp_path / "c.gguf")
    assert vocabulary.load(tmp_path / "c.gguf", 1 << 26).digest == first
    changed = metadata | {"tokenizer.chat_template": b"{{ messages }}"}
    assert tokenizer_digest(_write(tmp_path / "d.gguf", changed)) != first


def test_the_tokenizer_service_needs_no_numpy_for_gguf_files() -> None:
    """Its image has none."""
    code = "import sys, services.tokenizer.chats, services.tokenizer.vocabulary; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=50).returncode == 0


def test_version_2_files_are_read(tmp_path: Path) -> None:
    """The same layout with another number."""
    path = _write(tmp_path / "m.gguf", text_metadata(MODEL, "glm", 4096, (0,)).metadata)
    data = bytearray(path.read_bytes())
    data[4:8] = struct.pack("<I", 2)
    path.write_bytes(data)
    assert vocabulary.load(path, 1 << 26).size == 4096
