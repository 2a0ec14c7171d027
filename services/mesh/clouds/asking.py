"""The same question put to each cloud, as a client would: text, token ids and variant of the answer."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from autoglm import AutoglmError, Client, Delta, Done

PROMPT = "def read_lines(path):\n"
MAX_TOKENS = 32
SEED = 7
TEMPERATURE = 0.8
REGION_HEADER = "x-data-region"


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


def ask(
    ingress: str,
    model: str,
    region: str = "",
    prompt: str = PROMPT,
    max_tokens: int = MAX_TOKENS,
    timeout_s: float = 60.0,
) -> Answer:
    """One answer, sampled with a fixed seed. `region` pins it to that cloud. Raises `NoAnswer`."""
    metadata: Mapping[str, str] = {REGION_HEADER: region} if region else {}
    began = time.monotonic()
    text: list[str] = []
    ids: list[int] = []
    first_s, done = 0.0, None
    try:
        with (
            Client(ingress, model=model, timeout=timeout_s) as client,
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
                    ids += [token.token_id for token in event.tokens]
                elif isinstance(event, Done):
                    done = event
    except AutoglmError as error:
        raise NoAnswer(f"{type(error).__name__}: {error}") from error
    if done is None:
        raise NoAnswer("the stream ended without its end")
    return Answer("".join(text), tuple(ids), done.variant_digest, first_s, time.monotonic() - began)
