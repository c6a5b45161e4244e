"""How many bytes of text each token stands for."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.data.tokenize.tokenizer import Tokenizer

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def token_widths(tokenizer: Tokenizer) -> tuple[npt.NDArray[np.uint32], bool]:
    """Returns the UTF-8 bytes of text of each token id, and whether they are exact.

    They are for byte-level tokenizers, whose tokens are spelled with one character per byte. Others drop or add spaces
    where words meet, which no single token shows. Special tokens are no text.
    """
    tree = json.loads(tokenizer.content)
    exact = tokenizer.encoder == "bytes" or _is_byte_level(tree)
    vocab = tree["model"]["vocab"]
    items = vocab.items() if isinstance(vocab, dict) else ((token, i) for i, (token, _) in enumerate(vocab))
    widths = np.zeros(tokenizer.vocab_size, np.uint32)
    for token, number in items:
        widths[number] = len(token) if exact else _spelled_width(token)
    for token in tree.get("added_tokens") or []:
        widths[token["id"]] = 0 if token.get("special") else len(token["content"].encode())
    return widths, exact


def _spelled_width(token: str) -> int:
    return 1 if _BYTE.fullmatch(token) else len(token.removeprefix("##").replace("▁", " ").encode())


def _is_byte_level(tree: dict[str, Any]) -> bool:
    decoder = tree.get("decoder") or {}
    return any(part.get("type") == "ByteLevel" for part in (decoder, *decoder.get("decoders", ())))
