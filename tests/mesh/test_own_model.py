"""`make run MODEL=…`: a model of one's own, as a directory and as a GGUF file, behind a real Envoy.

One mesh for each; both are asked the same, and the executor in this process says what they must answer.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest

kernels = pytest.importorskip("autoglm_kernels", reason="the kernels are not compiled: run `make test`")
pytest.importorskip("transformers", reason="transformers is not installed: run `make test`")

from tokenizers import Tokenizer

from benchmarks.harness import running
from engine.checkpoints.export_gguf import export_gguf
from engine.checkpoints.opening import open_checkpoint
from engine.checkpoints.packed import pack_or_open
from engine.executors.interface import Span, Wants
from engine.executors.native import NativeExecutor
from engine.precision.plan import plan_for
from services.mesh import model
from services.mesh.rundir import RunDirectory
from services.mesh.settings import MeshSettings
from tests.fakes.checkpoints import write_checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]
PROMPT, LENGTH = "The first day", 24
TEMPLATE = "{% for message in messages %}<|user|>{{ message['content'] }}{% endfor %}<|assistant|>"

pytestmark = pytest.mark.timeout(180)


@dataclass(frozen=True)
class Own:
    """The same weights twice, and the greedy tokens they give."""

    directory: Path
    gguf: Path
    cache: Path
    text: str
    token_ids: list[int]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Own:
    root = tmp_path_factory.mktemp("own")
    directory, gguf, cache = root / "My Model", root / "my.gguf", root / "cache"
    write_checkpoint(directory, "qwen2", eos_token_id=[0])
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    checkpoint = open_checkpoint(directory)
    export_gguf(checkpoint, directory, gguf, "F32", lambda done, total: None)
    plan = plan_for("int8", checkpoint.architecture, True)
    weights = pack_or_open(checkpoint, plan, cache / "packed", 1, lambda done, total: None)
    executor = NativeExecutor(checkpoint.architecture, plan, weights, kernels.Device(1, False, ""), 16, 64)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    pending, start, chosen = tokenizer.encode(PROMPT, add_special_tokens=False).ids, 0, []
    for _ in range(LENGTH):
        (logits,) = executor.step([Span(pending, start, list(range(8)), Wants.LAST)])
        assert logits is not None
        start, pending = start + len(pending), [int(logits[0].argmax())]
        chosen += pending
    assert len(set(chosen)) > 3 and 0 not in chosen, "a constant continuation would prove nothing"
    checkpoint.close()
    return Own(directory, gguf, cache, tokenizer.decode(chosen), chosen)


@pytest.fixture(scope="module", params=["directory", "gguf"])
def client(request: pytest.FixtureRequest, own: Own) -> Iterator[tuple[openai.OpenAI, str]]:
    path: Path = getattr(own, request.param)
    relative = os.path.relpath(path, Path.cwd())
    with running(AUTOGLM_MODEL_DIR=relative, AUTOGLM_CACHE_DIR=str(own.cache)) as mesh:
        assert len(mesh.processes("sparse-inference")) == 1, "one worker has all CPUs"
        with openai.OpenAI(base_url=f"http://{mesh.ingress}/v1", api_key="-", max_retries=0) as opened:
            yield opened, model.name_of(path)


def test_it_is_served_by_its_own_name_and_answers_what_the_executor_computes(
    client: tuple[openai.OpenAI, str], own: Own
) -> None:
    """Models, completion, chat, stream; directory and GGUF file give the greedy tokens of the executor in-process."""
    caller, name = client
    assert [item.id for item in caller.models.list()] == [name] and name in ("My-Model", "my")
    asked = {"model": name, "prompt": PROMPT, "max_tokens": LENGTH, "temperature": 0.0}
    whole = caller.completions.create(**asked, logprobs=0)
    assert whole.choices[0].text == own.text and whole.choices[0].finish_reason == "length"
    assert whole.usage is not None and whole.usage.completion_tokens == LENGTH
    parts = [part.choices[0].text for part in caller.completions.create(**asked, stream=True) if part.choices]
    assert "".join(parts) == own.text
    chat = caller.chat.completions.create(
        model=name, messages=[{"role": "user", "content": "Hello"}], max_completion_tokens=8, temperature=0.0
    )
    assert chat.usage is not None and chat.usage.prompt_tokens == len("Hello") + 2


WRONG = {
    "nothing": (lambda own, root: root / "nowhere", "there is no such file or directory"),
    "no-config": (lambda own, root: root, "no config.json"),
    "a-folder-of-ggufs": (lambda own, root: own.gguf.parent, "name one of them, such as"),
    "architecture": (lambda own, root: changed(own, root, '"qwen2"', '"mamba"'), "mamba"),
    "damaged-gguf": (lambda own, root: cut(own, root), "broken.gguf"),
    "no-tokenizer": (lambda own, root: without_tokenizer(own, root), "no tokenizer.json"),
    "onnx": (lambda own, root: onnx(root), "ModelInfer"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_served_is_said_at_once(own: Own, tmp_path: Path, case: str) -> None:
    """Before anything is started, in words that name the path and the reason."""
    make, words = WRONG[case]
    with pytest.raises(model.UnusableModel, match=words):
        model.check(MeshSettings(model_dir=make(own, tmp_path)))


def test_a_model_larger_than_the_memory_is_refused_with_what_would_fit(
    own: Own, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size is known from the headers."""
    monkeypatch.setattr(model, "memory_bytes", lambda: 100 << 20)
    with pytest.raises(model.UnusableModel, match=r"need .* of memory, this machine has 100"):
        model.check(MeshSettings(model_dir=own.directory))


def test_the_command_fails_with_the_message_and_leaves_nothing_running(tmp_path: Path) -> None:
    """`run` with a wrong path: one line, exit status 1, no supervisor."""
    environment = {**os.environ, "AUTOGLM_MODEL_DIR": "no/where", "AUTOGLM_RUN_DIR": str(tmp_path / "run")}
    done = subprocess.run(
        [sys.executable, "-m", "services.mesh", "run"],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "no/where: there is no such file" in done.stdout, done.stdout + done.stderr
    assert RunDirectory(tmp_path / "run").holder() is None


def test_names_are_fit_for_an_address(tmp_path: Path) -> None:
    """Spaces, commas and a model hub's folders become a name that anything can carry."""
    names = {
        "a/My Model, v2": "My-Model-v2",
        "b/tiny.Q4_K.gguf": "tiny.Q4_K",
        "hub/models--Qwen--Qwen2.5-0.5B/snapshots/0123abc": "Qwen2.5-0.5B",
        "c/…": "model",
    }
    assert {place: model.name_of(tmp_path / place) for place in names} == names


def changed(own: Own, root: Path, before: str, after: str) -> Path:
    for path in own.directory.iterdir():
        (root / path.name).symlink_to(path)
    config = root / "config.json"
    text = config.read_text()
    config.unlink()
    config.write_text(text.replace(before, after))
    return root


def cut(own: Own, root: Path) -> Path:
    path = root / "broken.gguf"
    path.write_bytes(own.gguf.read_bytes()[:2000])
    return path


def without_tokenizer(own: Own, root: Path) -> Path:
    (root / "config.json").write_bytes((own.directory / "config.json").read_bytes())
    return root


def onnx(root: Path) -> Path:
    (root / "net.onnx").write_bytes(b"")
    return root / "net.onnx"
