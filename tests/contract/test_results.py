"""Results are what the page about them says, and each can be made again."""

from __future__ import annotations

import re

from benchmarks import overview


def test_the_page_of_results_is_current() -> None:
    """`python -m benchmarks.overview` after every measurement."""
    assert overview.PAGE.read_text() == overview.page()


def test_every_result_names_its_command_machine_and_commit() -> None:
    """A figure without them is a rumour."""
    for name, part in overview.parts():
        assert part["command"].startswith("python -m benchmarks."), name
        assert re.fullmatch("[0-9a-f]{40}(-dirty)?", part["commit"]), name
        assert part["machine"]["processor"] and part["unix_s"] > 1_700_000_000, name
        assert all(bar["name"] and bar["value"] for bar in part["bars"]), name
