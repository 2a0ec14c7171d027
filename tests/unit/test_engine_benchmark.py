"""The engine benchmark's result file."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.engine.__main__ import replace_part


def test_a_part_replaces_only_itself(tmp_path: Path) -> None:
    """A run of one part leaves what other runs wrote, even meanwhile, as it is."""
    path = tmp_path / "results" / "engine.json"
    replace_part(path, "mesh", {"commit": "a"})
    replace_part(path, "memory", {"commit": "a"})
    replace_part(path, "mesh", {"commit": "b"})
    assert json.loads(path.read_text())["parts"] == {"mesh": {"commit": "b"}, "memory": {"commit": "a"}}
