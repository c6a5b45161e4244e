"""Loads a `tokenizer.json`, encodes and decodes."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.data.read.documents import Documents, Offsets
from pipeline.data.tokenize import limits, tokenizer_json
from pipeline.errors import DataError
from pipeline.files import naming, parse_json, read_bounded, sha256_bytes
from pipeline.text_format import printable

if TYPE_CHECKING:
    import tokenizers

Ids = npt.NDArray[np.uint32]


class Tokenizer:
    """Encodes text and decodes ids; the text of a special token is always encoded as ordinary text.

    Attributes:
        digest: SHA-256 of the tokenizer.json.
        special_tokens: Their ids.
        vocab_size: One more than the largest id, including those of special tokens.
        end_of_text: The special token that ends a document; `end_of_text_id` is its id.
        encoder: What encodes: `gigatoken`, `tokenizers` or `bytes`.
        notice: Why the slow `tokenizers` encodes, or None.

    Args:
        content: Of the tokenizer.json.
        place: Names it in messages.
        end_of_text: The special token that ends a document; None for the likeliest.
        tried: Whether this is the trial of `limits`, which needs no trial.
    """

    def __init__(self, content: bytes, place: str, end_of_text: str | None = None, *, tried: bool = False) -> None:
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
        self._reference_lock = threading.Lock()
        self._decoder: tokenizers.Tokenizer | None = None
        self.notice: str | None = None
        self._fast: Any = None
        refused = limits.problem(tree)
        if refused is not None:
            raise DataError(f"{place}: the tokenizer is refused: {refused}; use another tokenizer.json")
        ordinary = tokenizer_json.ordinary_text_only(tree)
        self._added = ordinary.pop("added_tokens")
        self._rest = json.dumps(ordinary)
        if tokenizer_json.is_bytes(tree):
            self.encoder = "bytes"
            return
        if not (tried or limits.is_plain(tree)):
            limits.try_out(content, place)
        try:
            self._fast = self._load_gigatoken()
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
    def load(cls, path: str | Path, end_of_text: str | None = None, inside: Path | None = None) -> Tokenizer:
        """Reads a tokenizer.json.

        Args:
            path: The file.
            end_of_text: The special token that ends a document; by default the first one with a known name.
            inside: The folder that was received with the file; no link may lead out of it.

        Raises:
            DataError: The file is missing, is not a tokenizer.json or has no such token.
        """
        with naming(path, "the tokenizer cannot be read", error=DataError):
            content = read_bounded(path, inside, limits.LARGEST)
        return cls(content, str(path), end_of_text)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text; they never include a special token."""
        ids, _ = self.encode_batch(Documents.of([text.encode()]))
        return ids.tolist()

    def encode_batch(self, documents: Documents, parallel: bool = False) -> tuple[Ids, Offsets]:
        """Returns the concatenated ids of valid UTF-8 documents and where each begins: `(documents + 1,)`.

        Args:
            documents: The texts.
            parallel: Whether to use every core for this call or only the calling thread (the GIL is released).
        """
        if self.encoder == "bytes":
            first, last = documents.offsets[0], documents.offsets[-1]
            return documents.data[first:last].astype(np.uint32), documents.offsets - first
        if self.encoder == "gigatoken":
            with limits.named(self._place):
                encoded = self._fast.encode_batch(_as_awkward(documents), parallel=parallel).layout
            offsets = np.asarray(encoded.offsets.data, np.int64)
            return np.asarray(encoded.content.data)[: offsets[-1]], offsets
        lists = self.reference_encode([d.decode() for d in documents], parallel)
        offsets = np.zeros(len(lists) + 1, np.int64)
        np.cumsum([len(ids) for ids in lists], out=offsets[1:])
        return np.fromiter((i for ids in lists for i in ids), np.uint32, int(offsets[-1])), offsets

    def clear_caches(self) -> None:
        """Empties the caches of the encoder; other threads may continue to encode meanwhile."""
        if self.encoder == "gigatoken":
            self._fast = self._load_gigatoken()

    def reference_encode(self, texts: Sequence[str], parallel: bool = False) -> list[list[int]]:
        """Returns the ids by Hugging Face's `tokenizers`, against which the fast encoder is checked.

        Args:
            texts: The texts.
            parallel: As in `encode_batch`.
        """
        reference = self._load_reference()
        # tokenizers shares several texts among threads, one on each core, which the other workers of a build need.
        calls = [list(texts)] if parallel else [[text] for text in texts]
        with limits.named(self._place):
            return [e.ids for call in calls for e in reference.encode_batch_fast(call, add_special_tokens=False)]

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> str:
        """Returns the text of ids, with special tokens spelled out; bytes that are not UTF-8 become U+FFFD."""
        if self._decoder is None:
            self._decoder = self._load_tokenizers(self.content.decode())
        with limits.named(self._place):
            return self._decoder.decode([int(i) for i in ids], skip_special_tokens=False)

    def _load_gigatoken(self) -> Any:
        from gigatoken.gigatoken_rs import load_hf_json

        # Without its special tokens: gigatoken takes all other ids from the file.
        return load_hf_json(self._ordinary([token for token in self._added if not token.get("special")]))

    def _ordinary(self, added: list[dict[str, Any]]) -> str:
        """Returns the tokenizer.json for ordinary text with these added tokens."""
        return f'{self._rest[:-1]}, "added_tokens": {json.dumps(added)}}}'

    def _load_reference(self) -> tokenizers.Tokenizer:
        with self._reference_lock:  # the workers of a build first need it at about the same time
            if self._reference is None:
                reference = self._load_tokenizers(self._ordinary(self._added))
                reference.encode_special_tokens = True
                self._reference = reference
        return self._reference

    def _load_tokenizers(self, content: str) -> tokenizers.Tokenizer:
        import tokenizers

        try:
            loaded = tokenizers.Tokenizer.from_str(content)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # tokenizers raises plain Exception, and a panic of Rust is none
            raise DataError(f"{self._place}: tokenizers cannot read the tokenizer ({printable(error)})") from error
        loaded.no_truncation()
        loaded.no_padding()
        return loaded


def _as_awkward(documents: Documents) -> Any:
    """Wraps the documents for gigatoken, without a copy."""
    import awkward

    text = awkward.contents.NumpyArray(documents.data, parameters={"__array__": "byte"})
    layout = awkward.contents.ListOffsetArray(
        awkward.index.Index64(documents.offsets), text, parameters={"__array__": "bytestring"}
    )
    return awkward.Array(layout)


def _parse(content: bytes, place: str) -> dict[str, Any]:
    try:
        tree = parse_json(content)
        problem = tokenizer_json.problem(tree)
    except ValueError as error:
        problem = str(error)
    if problem is not None:
        raise DataError(f"{place}: is not a tokenizer.json ({problem}); restore it, or name another file")
    return tree
