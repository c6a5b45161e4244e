"""Trains a byte-level BPE."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence

from pipeline.data.tokenize import tokenizer_json
from pipeline.text_format import byte_characters


def train_bpe(
    sample: bytes,
    separator: bytes,
    vocab_size: int,
    special_tokens: Sequence[str],
    split_pattern: tokenizer_json.SplitPattern,
) -> str:
    """Trains a byte-level BPE and returns its tokenizer.json; the same sample gives the same file.

    Args:
        sample: Documents with `separator` between them.
        separator: Bytes that are in no document; nothing is merged across them.
        vocab_size: Tokens in total, including special ones; fewer where the sample has no more pairs.
        special_tokens: They get the last ids, in this order.
        split_pattern: How text is split before merging.
    """
    if split_pattern == "gpt2":
        vocabulary, merges = _train_gigatoken(sample, separator, vocab_size - len(special_tokens))
    else:
        vocabulary, merges = _train_tokenizers(sample, separator, vocab_size - len(special_tokens), split_pattern)
    return tokenizer_json.compose(vocabulary, merges, special_tokens, split_pattern)


def _train_gigatoken(sample: bytes, separator: bytes, size: int) -> tuple[list[bytes], list[tuple[bytes, bytes]]]:
    import gigatoken

    with _silenced():
        vocabulary, merges = gigatoken.train_bpe(sample, size, [], separator=separator)
    return [vocabulary[i] for i in range(len(vocabulary))], merges


def _train_tokenizers(
    sample: bytes, separator: bytes, size: int, split_pattern: tokenizer_json.SplitPattern
) -> tuple[list[bytes], list[tuple[bytes, bytes]]]:
    # gigatoken trains with GPT-2's pattern only.
    import tokenizers
    import tokenizers.trainers

    characters = byte_characters()
    blank = tokenizers.Tokenizer.from_str(
        tokenizer_json.compose([bytes([b]) for b in range(256)], [], [], split_pattern)
    )
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, initial_alphabet=characters, show_progress=False)
    blank.train_from_iterator((d.decode() for d in sample.split(separator)), trainer)
    byte_of = {c: b for b, c in enumerate(characters)}
    pairs = [
        (bytes(byte_of[c] for c in left), bytes(byte_of[c] for c in right))
        for left, right in json.loads(blank.to_str())["model"]["merges"]
    ]
    # Ids by byte value and then by merge, as for the other pattern.
    return [bytes([b]) for b in range(256)] + [a + b for a, b in pairs], pairs


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Discards what the process prints: gigatoken's trainer prints from Rust, past Python's own streams."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 1)
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved[0], 1)
        os.dup2(saved[1], 2)
        for fd in (*saved, null):
            os.close(fd)
