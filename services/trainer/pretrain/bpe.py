"""Trains the byte-level BPE vocabulary that glm-tiny and its tokenizer files use.

GLM's special tokens and prefix are kept (`[gMASK]<sop>` before every text), so HF GLM code reads the files unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIAL_TOKENS = ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
PREFIX = ("[gMASK]", "<sop>")
END = "<|endoftext|>"

# Words with one leading space, digits in threes, punctuation runs, newline + indentation as one piece.
_SPLIT = r"'(?:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\n *|[ \t]+(?=\S)|\s+"


def train(texts: Iterable[str], vocabulary_size: int) -> Tokenizer:
    """A `tokenizers.Tokenizer` of exactly `vocabulary_size` entries, special tokens first (ids 0…6)."""
    tokenizer = Tokenizer(models.BPE(unk_token=None, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    prefix_ids = [(token, tokenizer.token_to_id(token)) for token in PREFIX]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{' '.join(PREFIX)} $A", pair=f"{' '.join(PREFIX)} $A $B:1", special_tokens=prefix_ids
            ),
        ]
    )
    return tokenizer


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Each text as `[gMASK]<sop> … <|endoftext|>` ids."""
    end = tokenizer.token_to_id(END)
    if end is None:
        raise ValueError(f"the tokenizer has no token {END!r}")
    return [[*encoding.ids, end] for encoding in tokenizer.encode_batch(list(texts))]
