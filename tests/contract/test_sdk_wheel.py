"""What ships: the SDK's wheel, alone with grpcio and protobuf in a fresh environment.

Needs a package index for the build backend and the two dependencies; without one the tests are skipped, visibly.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import autoglm
import pytest

from tests.fakes.fake_gateway import FakeGateway

ROOT = Path(__file__).resolve().parents[2]
OFFLINE = re.compile(r"NewConnectionError|NameResolutionError|ConnectTimeout|ReadTimeout|ProxyError|unreachable")

pytestmark = pytest.mark.timeout(300)

USE = """
import importlib.metadata, importlib.resources, importlib.util, json, sys
import autoglm
with autoglm.Client(sys.argv[1], timeout=20) as client:
    text = client.generate("hello from the wheel").text
print(json.dumps({
    "text": text,
    "file": autoglm.__file__,
    "all": list(autoglm.__all__),
    "installed": sorted(d.metadata["Name"].lower() for d in importlib.metadata.distributions()),
    "importable": [n for n in ("pydantic", "rich", "typer", "numpy", "torch", "services", "engine", "grpc_health")
                   if importlib.util.find_spec(n)],
    "typed": (importlib.resources.files("autoglm") / "py.typed").is_file(),
}))
"""


def pip(*arguments: str, python: str = sys.executable) -> None:
    """Runs pip; skips when no index can be reached."""
    done = subprocess.run((python, "-m", "pip", *arguments), capture_output=True, text=True, timeout=280)
    if done.returncode and OFFLINE.search(done.stderr):
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT / "sdk"))
    (built,) = folder.glob("autoglm-*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The interpreter of an environment with nothing but the wheel and what it declares."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    interpreter = folder / "bin" / "python"
    pip("--python", str(interpreter), "install", "--quiet", str(wheel))
    return str(interpreter)


def clean_environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "AUTOGLM", "VIRTUAL"))}


async def run(*command: str, folder: Path) -> tuple[int, str, str]:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *command, stdout=pipe, stderr=pipe, cwd=folder, env=clean_environment()
    )
    out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    """Stubs, types marker and command line are inside; tests, services and caches are not."""
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"autoglm"}
    assert {"autoglm/py.typed", "autoglm/cli/app.py", "autoglm/gateway/v1/gateway_pb2.py"} <= set(names)
    assert not [name for name in names if "__pycache__" in name]


async def test_it_works_alone(python: str, tmp_path: Path) -> None:
    """Only grpcio and protobuf (and what grpcio itself needs) are there, and a generation goes through."""
    async with FakeGateway() as gateway:
        code, out, err = await run(python, "-c", USE, gateway.target, folder=tmp_path)
    assert code == 0, err
    seen = json.loads(out)
    assert seen["text"] == "hello from the wheel"
    assert not seen["file"].startswith(str(ROOT)) and seen["typed"]
    assert set(seen["installed"]) <= {"autoglm", "grpcio", "protobuf", "typing-extensions", "typing_extensions"}
    assert seen["importable"] == []
    assert seen["all"] == list(autoglm.__all__)


async def test_the_command_without_its_extra_says_how_to_get_it(python: str, tmp_path: Path) -> None:
    """One line, exit code 2, no traceback."""
    command = str(Path(python).parent / "autoglm")
    code, out, err = await run(command, "models", folder=tmp_path)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and "pip install 'autoglm[cli]'" in err


def test_the_readme_names_every_public_name() -> None:
    """`__all__` is what is documented, no more and no less."""
    text = (ROOT / "sdk" / "README.md").read_text()
    table = text[text.index("## Public names") :]
    assert sorted(set(re.findall(r"`([A-Za-z]+)`", table))) == list(autoglm.__all__)
