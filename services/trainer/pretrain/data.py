"""Turns the corpus into one stream of token ids: whole files, plus chat exchanges made from documented functions."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from services.trainer.pretrain.bpe import END, PREFIX, encode_documents
from services.trainer.pretrain.corpus import Document, Exchange, exchanges

MAX_EXCHANGES = 5000
EXCHANGE_TOKENS = 480
"""Longest exchange kept, in tokens: it must fit a training sequence whole."""


def training_ids(tokenizer: Tokenizer, documents: Sequence[Document], seed: int) -> npt.NDArray[np.uint16]:
    """Every document and exchange once, in seeded random order, as one flat array of ids."""
    chooser = random.Random(seed)
    pieces = encode_documents(tokenizer, [d.text for d in documents])
    pairs = [pair for document in documents if document.package != "test" for pair in exchanges(document)]
    chooser.shuffle(pairs)
    chats = [
        ids for ids in (chat_ids(tokenizer, pair) for pair in pairs[:MAX_EXCHANGES]) if len(ids) <= EXCHANGE_TOKENS
    ]
    pieces += chats
    chooser.shuffle(pieces)
    return np.concatenate([np.asarray(piece, dtype=np.uint16) for piece in pieces])


def chat_ids(tokenizer: Tokenizer, exchange: Exchange) -> list[int]:
    """The exchange as the chat template renders it, answer included, ended by `<|endoftext|>`."""
    prompt = chat_prompt_ids(tokenizer, exchange.request)
    # The newline after <|assistant|> is the prompt's; an answer starts at column 0, so it is a token of its own.
    return [*prompt[:-1], *_plain(tokenizer, "\n" + exchange.answer), _special(tokenizer, END)]


def chat_prompt_ids(tokenizer: Tokenizer, request: str) -> list[int]:
    """One user's request as the chat template renders it, up to where the assistant speaks."""
    return [
        *(_special(tokenizer, token) for token in PREFIX),
        _special(tokenizer, "<|user|>"),
        *_plain(tokenizer, "\n" + request),
        _special(tokenizer, "<|assistant|>"),
        *_plain(tokenizer, "\n"),
    ]


def _plain(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def _special(tokenizer: Tokenizer, token: str) -> int:
    number: int | None = tokenizer.token_to_id(token)
    assert number is not None, token
    return number
