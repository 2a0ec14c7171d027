"""A tokenizer.json for a vocabulary of 97: one token per printable ASCII character, a newline, and an end token."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

END = 96


def token_of(character: str) -> int:
    return 95 if character == "\n" else ord(character) - 32


def tokens_of(text: str) -> list[int]:
    return [token_of(character) for character in text]


def text_of(tokens: list[int]) -> str:
    return "".join("\n" if token == 95 else chr(32 + token) for token in tokens)


def tokenizer_json() -> str:
    # The byte-level alphabet writes a space as Ġ and a newline as Ċ.
    names = ["Ġ" if n == 0 else chr(32 + n) for n in range(95)] + ["Ċ"]
    tokenizer = Tokenizer(models.BPE(vocab={name: n for n, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    return tokenizer.to_str()
