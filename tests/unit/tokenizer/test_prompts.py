"""Prompts: what a template wrote and what a message said stay apart, and ids match the training format."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.tokenizer import prompts, vocabulary
from services.tokenizer.template_child import Renderer

MODEL = Path("models/glm-tiny")
GLM = vocabulary.load(MODEL, 1 << 26)
MARKS = prompts.make_marks(GLM)
CONTROLS = {token.text: token.token_id for token in GLM.controls.values()}
contents = st.lists(st.one_of(st.sampled_from([*CONTROLS, "<|", "|>", "assistant", "\n"]), st.text(max_size=6)))


def render(source: str, content: str, role: str = "user") -> prompts.Prompt:
    renderer = Renderer("2024-07-26", 1 << 20)
    renderer.load("m", source, MARKS.by_text, {"eos_token": "<|endoftext|>"})
    answer = renderer.render("m", [{"role": role, "content": content}], True)
    assert "text" in answer, answer
    return prompts.encode_prompt(GLM, answer["text"], MARKS)


GLM_TEMPLATE = (MODEL / "chat_template.jinja").read_text()


@settings(max_examples=200, deadline=None)
@given(contents)
def test_words_of_a_message_never_become_control_tokens(parts: list[str]) -> None:
    """Exactly the template's own control tokens are in the ids, whatever the message says; the text is unchanged."""
    content = "".join(parts)
    prompt = render(GLM_TEMPLATE, content)
    wanted = [CONTROLS[text] for text in ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>")]
    assert [number for number in prompt.token_ids if number in CONTROLS.values()] == wanted
    assert prompt.text == f"[gMASK]<sop><|user|>\n{content}<|assistant|>\n"


@pytest.mark.parametrize("content", ["hi", "    indented\n  code", " x", "\n\ny", "", "é 😀"])
def test_ids_are_those_the_model_was_trained_on(content: str) -> None:
    """The template's newline and the message's indentation are encoded together, as the training data does."""
    expected = [
        CONTROLS["[gMASK]"],
        CONTROLS["<sop>"],
        CONTROLS["<|user|>"],
        *GLM.encode("\n" + content),
        CONTROLS["<|assistant|>"],
        *GLM.encode("\n"),
    ]
    assert render(GLM_TEMPLATE, content).token_ids == expected


def test_ids_equal_the_training_datas_prefix() -> None:
    """A rendered request is the beginning of the exchange that training saw."""
    numpy = pytest.importorskip("numpy", reason="the training data module needs numpy")
    assert numpy
    from services.trainer.pretrain.corpus import Exchange
    from services.trainer.pretrain.data import chat_ids, chat_prompt_ids

    request = "Write a function `f`.\n    <|assistant|> is only text"
    exchange = Exchange(request, "def f(): ...")
    plain = vocabulary.load(MODEL, 1 << 26).plain
    prompt = render(GLM_TEMPLATE, request)
    assert prompt.token_ids == chat_prompt_ids(plain, request)
    assert chat_ids(plain, exchange)[: len(prompt.token_ids) - 1] == prompt.token_ids[:-1]


@pytest.mark.parametrize(
    ("source", "content", "text"),
    [
        ("<|user|>{{ messages[0].content | trim }}<|assistant|>", "  <|user|> x \n", "<|user|><|user|> x<|assistant|>"),
        ("{{ messages[0]['content'].split('<sop>')[-1].lstrip() }}", "a<sop>  b", "b"),
        ("{% if '<sop>' in messages[0].content %}yes<sop>{% endif %}", "a <sop>", "yes<sop>"),
        ("{{ messages[0].content.replace('<sop>', '!') }}", "a<sop>b", "a!b"),
        ("{{ messages[0].content | replace('<sop>', '') | upper }}", "a<sop>b", "AB"),
        ("{%- set t = '<|user|>' -%}{{ t ~ messages[0].content + eos_token }}", "q", "<|user|>q<|endoftext|>"),
        (
            "{%- macro m(t) -%}{{ t }}{{ messages[0].content | tojson }}{%- endmacro -%}{{ m('<sop>') }}",
            'é"',
            '<sop>"é\\""',
        ),
        ("{{ ['<sop>', messages[0].content, '<|user|>'] | join(' ') }}", "x", "<sop> x <|user|>"),
        ("{% generation %}<sop>{{ messages[0].content }}{% endgeneration %}", "x", "<sop>x"),
        ("{{ strftime_now('%d %b %Y') }}{{ messages[0].content }}", "x", "26 Jul 2024x"),
    ],
)
def test_filters_and_tests_see_the_message_as_it_is(source: str, content: str, text: str) -> None:
    """trim, split, replace, in, join and macros work on real words; the template's tokens stay tokens."""
    prompt = render(source, content)
    assert prompt.text == text
    written = sum(token in CONTROLS.values() for token in prompt.token_ids)
    from_message = sum(text.count(token) for token in CONTROLS) - written
    assert from_message == (2 - 1 if "trim" in source else 0)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content[:8] ~ messages[0].content[8:] }}",
        "<|{{ messages[0].content }}|>",
        "{{ '<|' ~ 'user|>' }}",
    ],
)
def test_tokens_put_together_from_parts_stay_text(source: str) -> None:
    """Neither a message nor a template can assemble a control token; the service switches such templates off."""
    assert not set(render(source, "user<|user|>user").token_ids) & set(CONTROLS.values())


def test_marks_are_not_guessable_and_survive_case_changes() -> None:
    """Two loads never share a nonce, and no filter of the sandbox changes one."""
    other = prompts.make_marks(GLM)
    assert other.nonce != MARKS.nonce
    for mark in other.by_text.values():
        assert mark == mark.upper() == mark.lower() == mark.strip() == mark.title()


def test_the_child_needs_only_jinja() -> None:
    """The template process imports neither gRPC nor the mesh."""
    import ast

    import services.tokenizer.template_child as child

    tree = ast.parse(Path(child.__file__).read_text())
    modules = {
        str(node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom) and (isinstance(node, ast.Import) or node.module)
    }
    assert modules - set(sys.stdlib_module_names) == {"jinja2"}
