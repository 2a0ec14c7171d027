"""Each peer's own virtual environment and model files, made once under one folder and kept.

The folder is AUTOGLM_PEERS_DIR, `.cache/peers` by default. Making one takes minutes (llama.cpp is built for this
processor) and a network. What cannot be made raises `Unavailable`, whose text goes into the result as the reason.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.shapes import Shape

REPOSITORY = Path(__file__).resolve().parents[2]
TORCH = "torch==2.13.0"  # the pin of the whole repository; a newer one brings gigabytes for other hardware
INSTALL_LIMIT_S = 3600
CONVERT_LIMIT_S = 1800


class Unavailable(Exception):
    """A peer or a model of it is not to be had on this machine; the text says why."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How pip makes one peer's environment."""

    builds_with: tuple[str, ...]
    installs: tuple[str, ...]
    from_source: tuple[str, ...] = ()
    cmake: str = ""
    removes: tuple[str, ...] = ()
    """Dependencies that are not used and break it."""


RECIPES = {
    "llama": Recipe(
        ("cmake", "ninja", "scikit-build-core", "numpy", "gguf"),
        ("llama-cpp-python>=0.3.36",),
        ("llama-cpp-python",),
        "-DGGML_NATIVE=ON -DLLAMA_CURL=OFF",
    ),
    # optimum-intel exports GLM with transformers below 5 only; its torchvision is for images, and the one that
    # pip finds beside a CPU-only torch does not load.
    "openvino": Recipe(
        (),
        (TORCH, "openvino-genai>=2026.4", "optimum-intel>=2.2", "nncf>=3.4", "transformers>=4.56,<5"),
        removes=("torchvision",),
    ),
    "onnxruntime": Recipe((), (TORCH, "onnxruntime-genai>=0.18", "onnxruntime", "onnx", "onnx-ir", "transformers<6")),
}


class Environments:
    """The folder with everything of the peers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()

    def python(self, peer: str) -> Path:
        """The interpreter of a peer's environment, installed now when it is not there. Raises Unavailable."""
        home, recipe = self.folder / peer, RECIPES[peer]
        stamp = home / ".installed"
        if not stamp.exists():
            print(f"installing {' '.join(recipe.installs)} into {home} (minutes; once)", flush=True)
            home.parent.mkdir(parents=True, exist_ok=True)
            self._run(f"{peer}-install", ["python3.11", "-m", "venv", str(home)], INSTALL_LIMIT_S)
            pip = [str(home / "bin/pip"), "--disable-pip-version-check", "install", "--quiet"]
            if recipe.builds_with:
                self._run(f"{peer}-install", [*pip, *recipe.builds_with], INSTALL_LIMIT_S)
            sources = [f"--no-binary={name}" for name in recipe.from_source]
            path = f"{home / 'bin'}:{os.environ.get('PATH', '')}"
            extra = {"CMAKE_ARGS": recipe.cmake, "PATH": path, "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1)}
            self._run(f"{peer}-install", [*pip, *sources, *recipe.installs], INSTALL_LIMIT_S, extra)
            if recipe.removes:
                self._run(
                    f"{peer}-install", [str(home / "bin/pip"), "uninstall", "--yes", *recipe.removes], INSTALL_LIMIT_S
                )
            stamp.touch()
        return home / "bin/python"

    def gguf(self, shape: Shape, kind: str) -> Path:
        """llama.cpp's file. Raises Unavailable."""
        home = self.folder / "models/gguf"
        path = home / f"{shape.name}-{kind}.gguf"
        if not path.exists():
            self._module("llama", "gguf_models", shape.name, str(home), kind)
        return path

    def openvino(self, shape: Shape, bits: int) -> Path:
        """OpenVINO's folder. Raises Unavailable."""
        path = self.folder / f"models/openvino/{shape.name}-int{bits}"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            checkpoint = self._checkpoint(shape, shape.family)
            self._module("openvino", "openvino", "convert", str(checkpoint), str(path), str(bits))
        return path

    def onnxruntime(self, shape: Shape) -> Path:
        """ONNX Runtime's folder; shapes of families its builder lacks are built as Llama. Raises Unavailable."""
        path = self.folder / f"models/onnxruntime/{shape.name}-int4"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            family = "llama" if shape.family == "glm" else shape.family
            checkpoint = self._checkpoint(shape, family)
            self._module("onnxruntime", "onnxruntime", "convert", str(checkpoint), str(path))
        return path

    def _checkpoint(self, shape: Shape, family: str) -> Path:
        path = self.folder / f"models/checkpoints/{shape.name}-{family}"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._module("openvino", "hf_models", shape.name, str(path), family)
        return path

    def _module(self, peer: str, module: str, *arguments: str) -> None:
        print(f"making {' '.join(arguments)} with {peer}", flush=True)
        command = [str(self.python(peer)), "-m", f"benchmarks.peers.{module}", *arguments]
        self._run(f"{peer}-{module}", command, CONVERT_LIMIT_S)

    def _run(self, name: str, command: list[str], limit_s: float, extra: dict[str, str] | None = None) -> None:
        log = self.folder / f"logs/{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as sink:
            try:
                subprocess.run(
                    command,
                    check=True,
                    stdout=sink,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    cwd=REPOSITORY,
                    env=environment() | (extra or {}),
                    timeout=limit_s,
                )
            except (OSError, subprocess.SubprocessError) as error:
                lines = log.read_text(errors="replace").strip().splitlines()
                raise Unavailable(f"{type(error).__name__}; {log} ends: {lines[-1] if lines else ''}"[:500]) from error


def environment() -> dict[str, str]:
    """This process's environment for a peer: our modules to be found, no thread limits meant for our tests."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "OPENBLAS_", "MKL_"))}
    return kept | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
