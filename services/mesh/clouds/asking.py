"""The same question put to each cloud, as a client would: text, token ids and variant of the answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from autoglm import AutoglmError, Client, Delta, Done

from services.mesh.identity import Unusable
from services.mesh.issuer import AUDIENCE, Issuer

PROMPT = "def read_lines(path):\n"
MAX_TOKENS = 32
SEED = 7
TEMPERATURE = 0.8
REGION_HEADER = "x-data-region"
TENANT = "me"
"""In whose name the clouds are asked by those who start and try them."""
TOKEN_LIFETIME = timedelta(hours=12)


class NoAnswer(Exception):
    """The request failed; the text says how."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    text: str
    token_ids: tuple[int, ...]
    variant_digest: str
    first_text_s: float
    total_s: float


def token(issuer: Path, tenant: str = TENANT, region: str = "") -> str:
    """A token that every cloud takes; `region` is where the tenant's data must stay. Raises `NoAnswer`."""
    try:
        return Issuer.open(issuer).token(tenant, AUDIENCE, TOKEN_LIFETIME, datetime.now(UTC), region)
    except Unusable as error:
        raise NoAnswer(str(error)) from None


def ask(
    ingress: str,
    model: str,
    bearer: str | None,
    region: str = "",
    prompt: str = PROMPT,
    max_tokens: int = MAX_TOKENS,
    timeout_s: float = 60.0,
    on_text: Callable[[], None] = lambda: None,
) -> Answer:
    """One answer, sampled with a fixed seed. `bearer` is the token; `region` pins it to that cloud; `on_text` hears of
    each piece.

    Raises `NoAnswer`.
    """
    metadata: Mapping[str, str] = {REGION_HEADER: region} if region else {}
    began = time.monotonic()
    text: list[str] = []
    ids: list[int] = []
    first_s, done = 0.0, None
    try:
        with (
            Client(ingress, model=model, token=bearer, timeout=timeout_s) as client,
            client.stream(
                prompt,
                max_tokens=max_tokens,
                seed=SEED,
                temperature=TEMPERATURE,
                ignore_eos=True,
                logprobs=True,
                metadata=metadata,
            ) as stream,
        ):
            for event in stream:
                if isinstance(event, Delta):
                    first_s = first_s or time.monotonic() - began
                    text.append(event.text)
                    on_text()
                    ids += [token.token_id for token in event.tokens]
                elif isinstance(event, Done):
                    done = event
    except AutoglmError as error:
        raise NoAnswer(f"{type(error).__name__}: {error}") from error
    if done is None:
        raise NoAnswer("the stream ended without its end")
    return Answer("".join(text), tuple(ids), done.variant_digest, first_s, time.monotonic() - began)
