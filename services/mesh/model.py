"""The model that the mesh serves: its public name, and whether it can be served at all, before anything is started.

`check` reads headers only, so that a wrong path, a damaged file or a model too large for this machine is told within a
second to whoever typed the command. Workers and the tokenizer check everything again.
"""

from __future__ import annotations

import re
from contextlib import closing
from pathlib import Path

from autoglm.manifest import MAX_MANIFEST_BYTES, BadManifest, hexadecimal, parse

from engine.checkpoints.digest_cache import default_cache_directory
from services.mesh.settings import MeshSettings

NAME_CHARACTERS = 64
FALLBACK_NAME = "model"
DIGEST_CHARACTERS = 12
ROOM_BYTES = 768 << 20
"""What the processes of a mesh take beside the weights."""


class UnusableModel(Exception):
    """The model cannot be served; the text says why and what to do."""


def name(settings: MeshSettings) -> str:
    """The public name of the model."""
    if settings.is_by_digest and not settings.model_name:
        return f"model-{str(settings.model_dir).removeprefix('sha256:')[:DIGEST_CHARACTERS]}"
    return settings.model_name or name_of(settings.model_dir)


def name_of(place: Path) -> str:
    """A name from a directory's or file's own: letters, digits, dots, hyphens and underscores."""
    place = place.absolute()
    if place.name in ("", ".."):
        place = place.resolve()
    if place.parent.name == "snapshots":  # of a model hub's cache: models--owner--name/snapshots/revision
        text = place.parent.parent.name.rpartition("--")[2]
    else:
        text = place.name.removesuffix(".gguf")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:NAME_CHARACTERS] or FALLBACK_NAME


def placeholders(settings: MeshSettings) -> dict[str, str]:
    """What the topology's environments may refer to."""
    threads = settings.threads
    if threads is None:
        threads = 0 if settings.is_own_model else 1
    return {
        "{model_dir}": settings.model_place,
        "{model_name}": name(settings),
        "{threads}": str(threads),
    }


def check(settings: MeshSettings) -> str:
    """One line on what will be served. Raises `UnusableModel`."""
    from engine.checkpoints import onnx_file
    from engine.checkpoints.digests import tokenizer_digest
    from engine.checkpoints.errors import CheckpointError
    from engine.checkpoints.gguf_tokenizer import read_text_files
    from engine.checkpoints.opening import open_checkpoint
    from engine.checkpoints.packed import layout_of
    from engine.precision.plan import plan_for

    if settings.is_by_digest:
        found = by_digest(settings)
        if not isinstance(found, Path):
            return found
        settings = settings.model_copy(update={"model_dir": found, "model_name": name(settings)})
    place = settings.model_dir.absolute()
    _check_place(place)
    try:
        if (file := onnx_file.find(place)) is not None:
            raise UnusableModel(
                f"{file} is an ONNX model and streams no text, so the mesh cannot route requests to it. A worker alone "
                f"serves it over the Open Inference Protocol (ModelInfer); start that with\n"
                f"  AUTOGLM_MODEL_DIR={file} AUTOGLM_MODEL_NAME={name_of(file)} "
                f"AUTOGLM_GRPC_PORT=8001 .venv/bin/python -m services.sparse_inference"
            )
        with closing(open_checkpoint(place)) as checkpoint:
            arch = checkpoint.architecture
        if place.suffix == ".gguf":
            read_text_files(place)
        else:
            tokenizer_digest(place)
        size = max(entry.end for entry in layout_of(arch, plan_for(settings.precision, arch, True)))
        needed4 = max(entry.end for entry in layout_of(arch, plan_for("int4", arch, True)))
    except CheckpointError as error:
        raise UnusableModel(str(error)) from None
    except ValueError as error:
        raise UnusableModel(f"AUTOGLM_PRECISION: {error}") from None
    except OSError as error:
        raise UnusableModel(f"{error.filename or place}: {error.strerror or error}") from None
    memory = memory_bytes()
    if memory and size + ROOM_BYTES > memory:
        smaller = "; PRECISION=int4 would fit" if needed4 + ROOM_BYTES <= memory else ""
        raise UnusableModel(
            f"{place}: {arch.parameters / 1e9:.1f} billion weights in {settings.precision} need "
            f"{_gib(size + ROOM_BYTES)} of memory, this machine has {_gib(memory)}{smaller}"
        )
    return (
        f"{name(settings)}: {arch.family}, {_count(arch.parameters)} weights, {_gib(size)} in {settings.precision}, "
        f"context {arch.max_position_embeddings}"
    )


def by_digest(settings: MeshSettings) -> Path | str:
    """Where a model that is named by a digest lies already; else one line on what is known of it.

    Known is what lies in this mesh's own cache; what an object store has is known only to the cache that asks it.
    Raises `UnusableModel`.
    """
    digest = str(settings.model_dir)
    try:
        key = hexadecimal(digest)
    except BadManifest as error:
        raise UnusableModel(f"{error}; `autoglm model push` prints one") from None
    home = default_cache_directory() / "models"
    kept = settings.run_dir / "cache" / "artifacts" / key[:2] / key
    for path in (home / f"{key}.json", kept):
        try:
            if path.stat().st_size <= MAX_MANIFEST_BYTES:
                found = parse(path.read_bytes(), digest)
                break
        except BadManifest as error:
            raise UnusableModel(str(error)) from None
        except OSError:
            continue
    else:
        if settings.cache_artifact_url:
            return f"{name(settings)}: {digest}, fetched from the object store if it is there"
        raise UnusableModel(
            f"{digest}: this mesh's cache does not have it. Put it there while the mesh runs with another model, by "
            f"`autoglm model push DIR`, or set AUTOGLM_CACHE_ARTIFACT_URL to the object store that has it"
        )
    place = home / key
    if place.is_dir():
        return place / found.single_file if found.single_file else place
    return f"{name(settings)}: {digest}, {len(found.files)} files, {_gib(found.total_bytes)}, fetched from the cache"


def memory_bytes() -> int:
    """Memory of this machine, or of the control group this process is in; 0 when it cannot be known."""
    found = 0
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found = next(int(line.split()[1]) << 10 for line in file if line.startswith("MemTotal:"))
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit.isdigit():
            found = min(found, int(limit))
    except (OSError, ValueError, StopIteration):
        pass
    return found


def _check_place(place: Path) -> None:
    """What a person is likely to have mistyped, in words that say what to type instead."""
    if "," in str(place) or "\n" in str(place):
        raise UnusableModel(f"{place}: a comma in the path is not supported; make a link to it elsewhere")
    if not place.exists():
        raise UnusableModel(f"{place}: there is no such file or directory")
    if place.is_file():
        if place.suffix not in (".gguf", ".onnx"):
            raise UnusableModel(f"{place}: give the directory of a model, or a .gguf file")
    elif not (place / "config.json").exists():
        inside = sorted(path.name for path in place.glob("*.gguf"))[:3]
        if inside:
            raise UnusableModel(f"{place}: a directory with .gguf files; name one of them, such as {place / inside[0]}")
        if not (place / "model.onnx").exists():
            raise UnusableModel(f"{place}: no config.json; a model directory has one, with its .safetensors files")
    elif not (place / "tokenizer.json").exists():
        raise UnusableModel(
            f"{place}: no tokenizer.json; for a tokenizer.model, transformers writes one: "
            f"AutoTokenizer.from_pretrained(…).save_pretrained(…)"
        )


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB" if size >= 1 << 28 else f"{size / (1 << 20):.1f} MiB"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.1f} million"
