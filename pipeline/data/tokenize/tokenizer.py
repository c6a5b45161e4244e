"""Train, load and use a `tokenizer.json`: the only code that knows gigatoken and tokenizers."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.data.read.documents import Documents, Offsets
from pipeline.data.tokenize import tokenizer_json
from pipeline.errors import DataError
from pipeline.files import sha256_bytes
from pipeline.text_format import byte_characters

if TYPE_CHECKING:
    import tokenizers

Ids = npt.NDArray[np.uint32]


class Tokenizer:
    """Text to ids and back. The text of a special token is encoded as ordinary text, always.

    Attributes:
        digest: SHA-256 of the tokenizer.json.
        vocab_size: One more than the largest id, special tokens included.
        special_tokens: Their ids.
        end_of_text: The special token that ends a document, and `end_of_text_id`, its id.
        encoder: What encodes: `gigatoken`, `tokenizers` or `bytes`.
        notice: Why the slow `tokenizers` encodes, or None.
    """

    def __init__(self, content: bytes, place: str, end_of_text: str | None = None) -> None:
        self.content = content
        self.digest = sha256_bytes(content)
        self._place = place
        tree = _parse(content, place)
        self.special_tokens = tokenizer_json.special_tokens(tree)
        self.vocab_size = tokenizer_json.vocabulary_size(tree)
        found = tokenizer_json.end_of_text(tree, end_of_text)
        if found is None:
            raise DataError(
                f"{place}: the tokenizer has no special token {end_of_text or 'to end a document with'!r}; "
                f"it has {', '.join(self.special_tokens) or 'none'}: set tokenizer.end_of_text to one of them"
            )
        self.end_of_text = found
        self.end_of_text_id = self.special_tokens[found]
        self._reference: tokenizers.Tokenizer | None = None
        self._decoder: tokenizers.Tokenizer | None = None
        self.notice: str | None = None
        self._fast: Any = None
        if tokenizer_json.is_bytes(tree):
            self.encoder = "bytes"
            return
        self._ordinary = json.dumps(tokenizer_json.without_special_tokens(tokenizer_json.ordinary_text_only(tree)))
        try:
            self._fast = _load_gigatoken(self._ordinary)
            self.encoder = "gigatoken"
        except (RuntimeError, ValueError) as error:
            reason = str(error).split("\n", 1)[0]
            self.notice = (
                f"{place}: gigatoken does not support this tokenizer ({reason}); "
                "tokenizers encodes, 50 to 100 times slower"
            )
            self.encoder = "tokenizers"
            self._load_reference()

    @classmethod
    def load(cls, path: str | Path, end_of_text: str | None = None) -> Tokenizer:
        """Reads a tokenizer.json.

        Args:
            path: The file.
            end_of_text: The special token that ends a document; by default the one its name gives away.

        Raises:
            DataError: The file is missing, is no tokenizer or has no such token.
        """
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise DataError(f"{path}: the tokenizer cannot be read ({error.strerror})") from error
        return cls(content, str(path), end_of_text)

    def encode(self, text: str) -> list[int]:
        """The ids of a text; no special token is ever among them."""
        ids, _ = self.encode_batch(Documents.of([text.encode()]))
        return ids.tolist()

    def encode_batch(self, documents: Documents, parallel: bool = False) -> tuple[Ids, Offsets]:
        """The ids of valid UTF-8 documents, one after the other, and where each begins: `(documents + 1,)`.

        Args:
            documents: The texts.
            parallel: Use every core for this call; otherwise the calling thread only (the GIL is released).
        """
        if self.encoder == "bytes":
            first, last = documents.offsets[0], documents.offsets[-1]
            return documents.data[first:last].astype(np.uint32), documents.offsets - first
        if self.encoder == "gigatoken":
            encoded = self._fast.encode_batch(_as_awkward(documents), parallel=parallel).layout
            offsets = np.asarray(encoded.offsets.data, np.int64)
            return np.asarray(encoded.content.data)[: offsets[-1]], offsets
        lists = self.reference_encode([d.decode() for d in documents])
        offsets = np.zeros(len(lists) + 1, np.int64)
        np.cumsum([len(ids) for ids in lists], out=offsets[1:])
        return np.fromiter((i for ids in lists for i in ids), np.uint32, int(offsets[-1])), offsets

    def forget_words(self) -> None:
        """Empties the caches of the encoder; other threads may go on encoding meanwhile."""
        if self.encoder == "gigatoken":
            self._fast = _load_gigatoken(self._ordinary)

    def reference_encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids by Hugging Face's `tokenizers`: what the fast encoder is checked against."""
        reference = self._load_reference()
        return [e.ids for e in reference.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> str:
        """The text of ids, special tokens spelled out; bytes that are no UTF-8 become U+FFFD."""
        if self._decoder is None:
            self._decoder = self._load_tokenizers(self.content.decode())
        return self._decoder.decode([int(i) for i in ids], skip_special_tokens=False)

    def _load_reference(self) -> tokenizers.Tokenizer:
        if self._reference is None:
            ordinary = tokenizer_json.ordinary_text_only(json.loads(self.content))
            reference = self._load_tokenizers(json.dumps(ordinary))
            reference.encode_special_tokens = True
            self._reference = reference
        return self._reference

    def _load_tokenizers(self, content: str) -> tokenizers.Tokenizer:
        import tokenizers

        try:
            loaded = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # tokenizers raises plain Exception
            raise DataError(f"{self._place}: is not a tokenizer that tokenizers can read ({error})") from error
        loaded.no_truncation()
        loaded.no_padding()
        return loaded


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
        separator: Bytes that no document holds; nothing is merged across them.
        vocab_size: Tokens in all, special ones included; fewer where the sample has no more pairs.
        special_tokens: They get the last ids, in this order.
        split_pattern: How text is cut before merging.
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
    """gigatoken trains with GPT-2's pattern only."""
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


def _load_gigatoken(content: str) -> Any:
    from gigatoken.gigatoken_rs import load_hf_json

    return load_hf_json(content)


def _as_awkward(documents: Documents) -> Any:
    """The documents as gigatoken takes them without a copy."""
    import awkward

    text = awkward.contents.NumpyArray(documents.data, parameters={"__array__": "byte"})
    layout = awkward.contents.ListOffsetArray(
        awkward.index.Index64(documents.offsets), text, parameters={"__array__": "bytestring"}
    )
    return awkward.Array(layout)


def _parse(content: bytes, place: str) -> dict[str, Any]:
    try:
        tree = json.loads(content)
        problem = tokenizer_json.problem(tree)
    except (ValueError, RecursionError) as error:
        problem = str(error)
    if problem is not None:
        raise DataError(f"{place}: is not a tokenizer.json ({problem}); restore it, or name another file")
    return tree


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """gigatoken's trainer prints from Rust, past Python's own streams."""
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
