"""What `envoy --mode validate` says, and what it does not say when it dies."""

from pathlib import Path

import pytest

from services.mesh import envoy
from services.mesh.envoy import Invalid

CRASHES = 'echo x >>"$0.runs"; [ $(wc -l <"$0.runs") -gt {times} ] && exit {then}; echo panic; kill -ABRT $$'


def stand_in(directory: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    """A program in Envoy's place, which cannot be made to crash at will."""
    program = directory / "envoy"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(envoy, "binary", lambda: program)
    return Path(f"{program}.runs")


async def test_a_crash_is_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Envoy that dies by a signal has not refused the configuration: it is asked once more."""
    runs = stand_in(tmp_path, monkeypatch, CRASHES.format(times=1, then=0))
    await envoy.validate({})
    assert len(runs.read_text().splitlines()) == 2


async def test_a_second_crash_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it may be the configuration: refused, with Envoy's words."""
    runs = stand_in(tmp_path, monkeypatch, CRASHES.format(times=9, then=0))
    with pytest.raises(Invalid, match="panic"):
        await envoy.validate({})
    assert len(runs.read_text().splitlines()) == 2


async def test_a_refusal_is_not_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit status 1 is the verdict."""
    runs = stand_in(tmp_path, monkeypatch, 'echo x >>"$0.runs"; echo no such field; exit 1')
    with pytest.raises(Invalid, match="no such field"):
        await envoy.validate({})
    assert len(runs.read_text().splitlines()) == 1
