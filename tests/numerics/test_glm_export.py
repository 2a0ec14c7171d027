"""The exported model directory: HF transformers must load it and compute what our own model computes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="exports and references need torch (dependency group `numerics`)")
transformers = pytest.importorskip("transformers", reason="the reference is HF (dependency group `numerics`)")

from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors import safe_open
from tokenizers import Tokenizer

from services.trainer.pretrain import bpe, data, export
from services.trainer.pretrain.corpus import Exchange
from services.trainer.pretrain.glm import Glm, GlmShape

SHAPE = GlmShape(
    vocab_size=400,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=128,
)
TEXT = 'def parse(line, limit=10):\n    """Split a line."""\n    return line.split()[:limit]\n\n\nclass A:\n    pass\n'


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Models this small lose time to threads: on a busy machine, a hundredfold."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("glm")
    torch.manual_seed(5)
    model = Glm(SHAPE)
    with torch.no_grad():
        for parameter in model.parameters():  # Large enough that the logits depend on every part of the network.
            parameter.copy_(torch.randn_like(parameter) * (0.15 if parameter.ndim == 2 else 1.0))
    export.write(model, bpe.train([TEXT * 4], SHAPE.vocab_size), out)
    return out


@pytest.fixture(scope="module")
def reference(directory: Path) -> Any:
    return transformers.GlmForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


def test_transformers_computes_the_same_logits(directory: Path, reference: Any) -> None:
    """Rotary pairs, head groups, gate order and norms mean the same to HF: fp32 logits agree to 1e-4 relative."""
    model = export.read(directory)
    ids = torch.randint(0, SHAPE.vocab_size, (2, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = model.logits(model(ids)), reference(ids).logits
    scale = theirs.abs().max()
    assert scale > 1, "the random model is too flat for this comparison to mean anything"
    assert ((ours - theirs).abs().max() / scale).item() <= 1e-4


def test_transformers_writes_the_same_greedy_tokens(directory: Path, reference: Any, tokenizer: Tokenizer) -> None:
    """HF's cached generation and our recomputed one choose the same tokens and stop at the same ids."""
    model = export.read(directory)
    prompt = tokenizer.encode("def parse(line):\n").ids
    stops = json.loads((directory / "config.json").read_text())["eos_token_id"]
    ours = list(prompt)
    with torch.no_grad():
        while len(ours) < len(prompt) + 24 and ours[-1] not in stops:
            ours.append(int(model.logits(model(torch.tensor([ours])))[0, -1].argmax()))
        theirs = reference.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0].tolist()
    assert ours == theirs
    assert len(set(ours[len(prompt) :])) > 4, "a constant continuation would prove nothing"


def test_the_file_holds_bf16_weights_under_hf_names_without_the_tied_head(directory: Path, reference: Any) -> None:
    """Exactly HF's parameters, the tied head omitted, all bf16, readable by everyone."""
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    assert set(tensors) == set(reference.state_dict()) - {"lm_head.weight"}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert (directory / "model.safetensors").stat().st_mode & 0o044


def test_a_checkpoint_and_its_export_are_the_same_model(tmp_path: Path, directory: Path, tokenizer: Tokenizer) -> None:
    """A model read back and written again is byte for byte the same file."""
    export.write(export.read(directory), tokenizer, tmp_path)
    assert export.weights_digest(tmp_path) == export.weights_digest(directory)
    assert (tmp_path / "tokenizer.json").read_bytes() == (directory / "tokenizer.json").read_bytes()


def test_hf_sees_the_special_tokens_and_stop_ids(directory: Path) -> None:
    """The end of the text, the user's turn and an observation end a generation; the prefix is added by encoding."""
    hf = transformers.AutoTokenizer.from_pretrained(directory)
    stops = transformers.GenerationConfig.from_pretrained(directory).eos_token_id
    assert hf.convert_ids_to_tokens(stops) == ["<|endoftext|>", "<|user|>", "<|observation|>"]
    assert (hf.eos_token, hf.pad_token) == ("<|endoftext|>", "<|endoftext|>")
    assert set(bpe.SPECIAL_TOKENS) <= set(hf.all_special_tokens)
    ids = hf("x = 1").input_ids
    assert hf.convert_ids_to_tokens(ids[:2]) == list(bpe.PREFIX)
    assert hf.decode(ids, skip_special_tokens=True) == "x = 1"


EXCHANGES = [
    Exchange("Write a Python function `parse`.", "def parse(line):\n    return line\n"),
    Exchange("", "x"),
    Exchange("  spaces around  \n\n", "    indented\n"),
    Exchange("{{ 7 * 7 }} {% raw %} 'quotes' \"and\" <tags> & é 漢 🙂", "\n\nlate"),
]


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("trim_blocks", [False, True])
def test_the_template_renders_what_was_trained_on(
    directory: Path, tokenizer: Tokenizer, exchange: Exchange, trim_blocks: bool
) -> None:
    """In a plain Jinja sandbox, however it treats blank space, an exchange becomes exactly its training ids."""
    sandbox = ImmutableSandboxedEnvironment(trim_blocks=trim_blocks, lstrip_blocks=trim_blocks)
    template = sandbox.from_string((directory / "chat_template.jinja").read_text())
    asked = {"role": "user", "content": exchange.request}
    answered = {"role": "assistant", "content": exchange.answer}
    prompt = template.render(messages=[asked], add_generation_prompt=True)
    assert tokenizer.encode(prompt, add_special_tokens=False).ids == data.chat_prompt_ids(tokenizer, exchange.request)
    whole = template.render(messages=[asked, answered], add_generation_prompt=False)
    assert tokenizer.encode(whole, add_special_tokens=False).ids == data.chat_ids(tokenizer, exchange)[:-1]


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_hf_renders_the_template_alike(directory: Path, tokenizer: Tokenizer, exchange: Exchange) -> None:
    """`apply_chat_template` gives the training prefix, from the tokenizer config as from the template file."""
    hf = transformers.AutoTokenizer.from_pretrained(directory)
    messages = [{"role": "user", "content": exchange.request}]
    ids = hf.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == data.chat_prompt_ids(tokenizer, exchange.request)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    assert config["chat_template"] == (directory / "chat_template.jinja").read_text()


def test_roles_and_content_parts_have_one_rendering(directory: Path) -> None:
    """System, developer and tool roles map to GLM's names; text parts are joined; an unknown role is refused."""
    hf = transformers.AutoTokenizer.from_pretrained(directory)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None},
        {"role": "tool", "content": "42"},
    ]
    text = hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == ("[gMASK]<sop><|system|>\nBe brief.<|user|>\nab<|assistant|>\n<|observation|>\n42<|assistant|>\n")
    with pytest.raises(Exception, match="unknown role: narrator"):
        hf.apply_chat_template([{"role": "narrator", "content": "Once"}], tokenize=False)
