"""`python -m services.trainer.pretrain`: trains glm-tiny from this machine's Python standard library."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from services.trainer.pretrain import card, corpus, evaluate, export
from services.trainer.pretrain.stages import OtherCorpusError, Stages
from services.trainer.pretrain.train import Plan

app = typer.Typer(add_completion=False, help=__doc__)
console = Console()


@app.command()
def main(
    work: Path = typer.Option(Path(".cache/pretrain"), help="Checkpoints and intermediate files; resumes from here."),
    out: Path = typer.Option(Path("models/glm-tiny"), help="Where the finished model directory is written."),
    minutes: float = typer.Option(100.0, min=0.05, max=120.0, help="Upper bound on training time."),
    tokens: int = typer.Option(20_000_000, min=8192, help="Tokens to train on; the run ends at whichever comes first."),
    finish: bool = typer.Option(False, "--finish", help="Train no further: go on from the checkpoint as it is."),
    measure_bytes: int = typer.Option(2_000_000, min=10_000, help="Measure on at most this much held-out text."),
) -> None:
    """Corpus → vocabulary → training → export → measurement → model card, each step kept in WORK, skipped when done."""
    console.print("reading the standard library …")
    text = corpus.load()
    console.print(f"{len(text.train)} training files, {len(text.held_out)} held out, {len(text.dropped)} dropped")
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        stages = Stages(work, text, bar)
        try:
            manifest = stages.manifest()
        except OtherCorpusError as error:
            raise typer.BadParameter(str(error), param_hint="--work") from error
        tokenizer = stages.tokenizer()
        plan = Plan(tokens=tokens, minutes=minutes)
        ids = stages.ids(tokenizer, plan)
        run, model = stages.train(ids, plan, finish)
        export.write(model, tokenizer, out)
        held_out = evaluate.chosen(text.held_out, measure_bytes)
        compared = stages.baselines(held_out, tokenizer, ids)
        measured = stages.measurement(held_out, tokenizer, out)
    card.write(out, run, measured, compared, manifest)
    console.print(f"{out}: {measured['held_out']['bits_per_byte']:.3f} bits per held-out byte")


if __name__ == "__main__":
    app()
