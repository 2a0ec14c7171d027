"""The catalogue: which models can be asked for, as the workers tell it. Cached for seconds, one question at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from services.chassis.errors import NotFound, WrongVariant

MAX_REMEMBERED = 256
"""Models whose first sighting is remembered; also what ListModels may return at most."""


@dataclass(frozen=True, slots=True)
class Model:
    """One model, as the variant that now answers describes itself."""

    name: str
    variant_digest: str
    tokenizer_digest: str
    context_tokens: int
    parameters: int
    created_unix_s: int = 0


def check_tokenizer(model: Model, digest: str) -> None:
    """Fails closed, as WrongVariant, where a tokenizer answered that the model was not made with."""
    if digest != model.tokenizer_digest:
        raise WrongVariant(
            "the tokenizer is not the one this model was made with", expected=model.tokenizer_digest, seen=digest
        )


class Catalogue:
    """Asks `describe` at most once per `ttl_s`. Failures are not cached: the next caller asks again."""

    def __init__(
        self,
        describe: Callable[[], Awaitable[Model]],
        ttl_s: float,
        now: Callable[[], float],
        monotonic: Callable[[], float],
    ) -> None:
        self._describe, self._ttl_s = describe, ttl_s
        self._now, self._monotonic = now, monotonic
        self._asking = asyncio.Lock()
        self._models: dict[str, Model] = {}
        self._asked_at = float("-inf")
        self._first_seen: dict[str, int] = {}

    async def all(self) -> tuple[Model, ...]:
        """The models that answer now. Raises what the worker's call raises."""
        async with self._asking:
            if self._monotonic() - self._asked_at >= self._ttl_s:
                model = await self._describe()
                if len(self._first_seen) < MAX_REMEMBERED:
                    self._first_seen.setdefault(model.name, int(self._now()))
                created = self._first_seen.get(model.name, int(self._now()))
                self._models = {model.name: replace(model, created_unix_s=created)}
                self._asked_at = self._monotonic()
            return tuple(self._models.values())

    async def get(self, name: str) -> Model:
        """The model called `name`; NotFound names those that exist."""
        models = await self.all()
        for model in models:
            if model.name == name:
                return model
        known = ", ".join(model.name for model in models) or "none"
        raise NotFound(f"the model {name!r} does not exist; available: {known}", field="model", kind="model_not_found")
