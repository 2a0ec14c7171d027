"""Mistakes in policy, each with its place, so that one run of the loader tells an operator everything at once."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake. Warnings describe policy that works but surely not as its author meant."""

    file: str
    object: str
    path: str
    message: str
    severity: Literal["error", "warning"] = "error"

    def __str__(self) -> str:
        return ": ".join(part for part in (self.file, self.object, self.path, self.message) if part)


class PolicyError(Exception):
    """The policy cannot be used. `problems` holds all mistakes found, in file order."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = problems
