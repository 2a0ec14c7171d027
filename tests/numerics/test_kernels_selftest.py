"""The kernels' own test program gives the committed hashes on every instruction set of this CPU.

kernels/selftest/expected.txt is what makes "the same tokens on every CPU" checkable on one CPU: `make test-arm` and
anybody with another processor compare with the same lines. A change of arithmetic changes the file, on purpose.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import autoglm_kernels
import pytest

ROOT = Path(__file__).resolve().parents[2]
EXPECTED = ROOT / "kernels" / "selftest" / "expected.txt"


@pytest.fixture(scope="module")
def program() -> Path:
    """The test program, built where it stays for the next run."""
    build = ROOT / ".cache" / "selftest" / "native"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if shutil.which("cmake", path=path) is None or shutil.which("ninja", path=path) is None:
        pytest.skip("cmake or ninja is not installed")
    environment = {**os.environ, "PATH": path}
    configure = ["cmake", "-G", "Ninja", "-S", str(ROOT / "kernels"), "-B", str(build), "-DAUTOGLM_SELFTEST=ON"]
    for command in (configure, ["cmake", "--build", str(build)]):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return build / "autoglm-selftest"


@pytest.mark.timeout(900)  # the first run compiles every instruction set
@pytest.mark.parametrize("isa", autoglm_kernels.available())
def test_every_instruction_set_gives_the_committed_bits(program: Path, isa: str) -> None:
    """Threads, batches, chunks, page orders and skipping change nothing, and neither does the instruction set."""
    command = [str(program), "--isa", isa, "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == EXPECTED.read_text()
