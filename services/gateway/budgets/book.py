"""Who may use how many tokens: a small TOML file, read at start and again whenever it changes.

    version = 1

    [default]                      # each tenant not named below has one of its own; without it they have no limit
    tokens_per_minute = 60_000

    [tenants.acme]
    tokens_per_minute = 600_000
    burst_tokens = 1_200_000       # what may be saved up; one minute's worth unless given

    [tenants.batch]
    unlimited = true

A file that is wrong is refused as a whole: at start the gateway does not start, later the old budgets stay.
"""

from __future__ import annotations

import asyncio
import logging
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from services.chassis import telemetry
from services.gateway.budgets.bucket import Budget

log = logging.getLogger("autoglm.budgets")

MAX_FILE_BYTES = 256 * 1024
MAX_TENANTS = 1000
"""Named in the file; also how many values the label `tenant` of the metrics can have."""

Tenant = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[!-~]+$")]
Tokens = Annotated[int, Field(ge=1, le=10**12)]


class WrongBudgets(Exception):
    """The file cannot be used; the text has every reason, one per line."""


@dataclass(frozen=True, slots=True)
class Book:
    """Budgets by tenant. None is no limit."""

    default: Budget | None = None
    tenants: Mapping[str, Budget | None] = field(default_factory=dict)

    def of(self, tenant: str) -> Budget | None:
        return self.tenants[tenant] if tenant in self.tenants else self.default

    def label(self, tenant: str) -> str:
        """The tenant as a metric may name it: callers must not invent time series."""
        return tenant if tenant in self.tenants else "other"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Limit(_Strict):
    tokens_per_minute: Tokens | None = None
    burst_tokens: Tokens | None = None
    unlimited: bool = False

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        if self.unlimited and (self.tokens_per_minute is not None or self.burst_tokens is not None):
            raise ValueError("unlimited stands alone: leave out tokens_per_minute and burst_tokens")
        if not self.unlimited and self.tokens_per_minute is None:
            raise ValueError("tokens_per_minute is missing (or say unlimited = true)")
        return self

    def budget(self) -> Budget | None:
        if self.tokens_per_minute is None:
            return None
        return Budget(self.tokens_per_minute, self.burst_tokens or self.tokens_per_minute)


class _File(_Strict):
    version: Literal[1]
    default: _Limit | None = None
    tenants: dict[Tenant, _Limit] = Field(default_factory=dict, max_length=MAX_TENANTS)


def parse(content: bytes) -> Book:
    """The budgets in a file's content. Raises WrongBudgets."""
    if len(content) > MAX_FILE_BYTES:
        raise WrongBudgets(f"larger than {MAX_FILE_BYTES} bytes")
    try:
        file = _File.model_validate(tomllib.loads(content.decode()))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise WrongBudgets(str(error)) from None
    except ValidationError as error:
        places = [(".".join(map(str, problem["loc"])) or "file", problem["msg"]) for problem in error.errors()]
        raise WrongBudgets("\n".join(f"{place}: {text}" for place, text in places)) from None
    return Book(
        file.default.budget() if file.default is not None else None,
        {name: limit.budget() for name, limit in file.tenants.items()},
    )


class Shelf:
    """The book in force. `watch` exchanges it when the file changes; without a file it stays empty: no limits."""

    def __init__(self, path: Path | None, every_s: float) -> None:
        """Raises WrongBudgets when the file cannot be read or is wrong."""
        self._path, self._every_s = path, every_s
        self.book = Book()
        self._seen: tuple[int, ...] = ()
        if path is not None:
            try:
                self._seen, self.book = _mark(path), parse(_read(path))
            except OSError as error:
                raise WrongBudgets(f"{path}: {error.strerror or error}") from None
            except WrongBudgets as error:
                raise WrongBudgets(f"{path}: {error}") from None

    async def watch(self) -> None:
        """Looks at the file again and again; a change that cannot be used is counted and told, once."""
        while self._path is not None:
            await asyncio.sleep(self._every_s)
            await asyncio.to_thread(self.look, self._path)

    def look(self, path: Path) -> None:
        """Reads the file if it is another than the last time."""
        try:
            mark = _mark(path)
        except OSError:
            mark = ()
        if mark == self._seen:
            return
        self._seen = mark
        try:
            self.book = parse(_read(path))
        except (OSError, WrongBudgets) as error:
            telemetry.fallback("budgets_kept", file=path, reason=" ".join(str(error).split()))
        else:
            log.info("budgets read", extra={"facts": {"file": str(path), "tenants": len(self.book.tenants)}})


def _mark(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size)


def _read(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(MAX_FILE_BYTES + 1)
