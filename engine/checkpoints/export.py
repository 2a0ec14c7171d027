"""`python -m engine.checkpoints.export MODEL OUT [--type q8_0]`: a model as a .gguf file, or as an .onnx graph."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from engine.checkpoints.architecture import CheckpointError
from engine.checkpoints.export_gguf import Exported, export_gguf
from engine.checkpoints.opening import open_checkpoint


def export(
    model: Annotated[Path, typer.Argument(help="a Hugging Face model directory or a .gguf file")],
    out: Annotated[Path, typer.Argument(help="file to write: .gguf or .onnx")],
    kind: Annotated[str, typer.Option("--type", help="weights of a .gguf file: f32, f16, bf16 or q8_0")] = "q8_0",
) -> None:
    """Write a model as a GGUF file, or as an ONNX graph in float32."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    try:
        with (
            contextlib.closing(open_checkpoint(model)) as checkpoint,
            Progress(*columns, console=console, transient=True) as bar,
        ):
            task = bar.add_task(out.name, total=None)

            def progress(done: int, total: int) -> None:
                bar.update(task, completed=done, total=total)

            if out.suffix == ".onnx":
                from engine.checkpoints.export_onnx import export_onnx  # needs the group `export`

                written = Exported(export_onnx(checkpoint, out), ())
            elif out.suffix == ".gguf":
                written = export_gguf(checkpoint, model, out, kind.upper(), progress)
            else:
                raise CheckpointError(f"{out}: .gguf and .onnx can be written")
    except (CheckpointError, ImportError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False)
        sys.exit(2)
    for note in written.notes:
        console.print(f"note: {note}", style="yellow", markup=False, highlight=False)
    console.print(f"{out}: {written.bytes_written} bytes", markup=False, highlight=False)


if __name__ == "__main__":
    typer.run(export)
