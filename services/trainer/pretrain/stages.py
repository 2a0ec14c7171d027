"""The steps of `make model`, each kept as a file in one working directory and skipped when that file still fits.

Called by the command line in order. Files: manifest.json, tokenizer.json, train.npy, run.json, checkpoint/,
baselines.json, measurement.json. A measurement fits while the text and the exported weights it names are the same.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.progress import Progress
from tokenizers import Tokenizer

from services.trainer.pretrain import baselines, bpe, data, evaluate, export, record
from services.trainer.pretrain.corpus import Corpus, Document
from services.trainer.pretrain.glm import Glm, GlmShape
from services.trainer.pretrain.train import Plan, Step, train

LINE_EVERY_STEPS = 20
"""Without a terminal there is no bar; a line is printed this often instead."""


class OtherCorpusError(Exception):
    """The working directory was begun on other text: run that Python again, or choose another directory."""


class Stages:
    """One working directory, one corpus. Methods return what is stored, or make and store it."""

    def __init__(self, work: Path, text: Corpus, bar: Progress) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self._work, self._text, self._bar = work, text, bar

    def manifest(self) -> dict[str, Any]:
        path = self._work / "manifest.json"
        manifest: dict[str, Any] = json.loads(json.dumps(self._text.manifest()))
        if not path.exists():
            _save(path, manifest)
        if json.loads(path.read_text()) != manifest:
            raise OtherCorpusError(
                f"{self._work} was begun on another standard library (its {path.name} differs); "
                "use the Python it was begun with, or give another --work"
            )
        return manifest

    def tokenizer(self) -> Tokenizer:
        path, entries = self._work / "tokenizer.json", GlmShape().vocab_size
        if not path.exists():
            self._say(f"training a byte-level BPE of {entries} entries …")
            bpe.train((d.text for d in self._text.train), entries).save(str(path))
        return Tokenizer.from_file(str(path))

    def ids(self, tokenizer: Tokenizer, plan: Plan) -> npt.NDArray[np.uint16]:
        path = self._work / "train.npy"
        if not path.exists():
            np.save(path, data.training_ids(tokenizer, self._text.train, plan.seed))
        ids: npt.NDArray[np.uint16] = np.load(path, allow_pickle=False)
        self._say(f"{len(ids):,} training tokens")
        return ids

    def train(self, ids: npt.NDArray[np.uint16], plan: Plan, finish: bool) -> tuple[record.Run, Glm]:
        """Trains until the plan is fulfilled, or with `finish` not at all; a finished run is only read back."""
        path, checkpoint = self._work / "run.json", self._work / "checkpoint"
        run = record.load(path)
        if run is None or not (finish or run.is_finished):
            run = record.begin(plan, self._sizes() | {"train_tokens": len(ids)})
            run.save(path)
        if not (finish or run.is_finished):
            train(ids, GlmShape(), plan, checkpoint, _TrainingDisplay(self._bar))
        model, counters = export.from_checkpoint(checkpoint / "state.safetensors")
        if not run.is_finished or run.tokens != int(counters["tokens"]):
            run = run.finished(int(counters["tokens"]), counters["spent_s"])
            run.save(path)
        self._say(f"training is finished: {run.tokens:,} tokens in {run.spent_s / 60:.0f} min")
        return run, model

    def baselines(
        self, held_out: Sequence[Document], tokenizer: Tokenizer, ids: npt.NDArray[np.uint16]
    ) -> dict[str, Any]:
        path = self._work / "baselines.json"
        stored = _load(path)
        if stored is not None and stored["held_out_digest"] == baselines.digest(held_out):
            return stored
        task = self._bar.add_task("baselines", total=baselines.COUNT)

        def show(done: int, name: str) -> None:
            self._bar.update(task, completed=done, description=f"baseline: {name}")

        result = baselines.measure(self._text.train, held_out, tokenizer, ids, show)
        _save(path, result)
        return result

    def measurement(self, held_out: Sequence[Document], tokenizer: Tokenizer, out: Path) -> dict[str, Any]:
        path = self._work / "measurement.json"
        stored = _load(path)
        wanted = (export.weights_digest(out), baselines.digest(held_out))
        if stored is not None and (stored["weights"], stored["held_out_digest"]) == wanted:
            return stored
        task = self._bar.add_task("measuring", total=1.0)

        def show(share: float, label: str) -> None:
            self._bar.update(task, completed=share, description=f"measuring: {label}")

        result = evaluate.measure(out, held_out, self._text.train, tokenizer, show)
        _save(path, result)
        return result

    def _sizes(self) -> dict[str, int]:
        sides = {"train": self._text.train, "held_out": self._text.held_out}
        return {f"{side}_bytes": sum(len(d.text.encode()) for d in documents) for side, documents in sides.items()}

    def _say(self, line: str) -> None:
        self._bar.console.print(line)


class _TrainingDisplay:
    """Shows each training step: as a bar on a terminal, as a line now and then elsewhere."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task = bar.add_task("training", total=1.0)
        self._steps = 0

    def __call__(self, step: Step) -> None:
        self._steps += 1
        label = f"loss {step.loss:.3f}  {step.tokens / 1e6:.2f} M tokens  {step.tokens_per_s:,.0f} tok/s"
        self._bar.update(self._task, completed=step.progress, description=label)
        if not self._bar.console.is_terminal and self._steps % LINE_EVERY_STEPS == 1:
            self._bar.console.print(f"{100 * step.progress:5.1f} %  {label}")


def _load(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return stored


def _save(path: Path, content: dict[str, Any]) -> None:
    export.write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
