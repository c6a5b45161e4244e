"""Bounds for a tokenizer.json of any origin: refused by its content, or by a trial in a child process with limits.

A regular expression can take forever on a short text, a normalizer can make a gigabyte of a kilobyte, and the libraries
abort the whole process where memory ends or a table of theirs is damaged.

    python -m pipeline.data.tokenize.limits < tokenizer.json      the trial
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import functools
import os
import resource
import string
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.data.tokenize import tokenizer_json
from pipeline.errors import DataError, PipelineError
from pipeline.text_format import printable

# The largest published ones have 35 MB.
LARGEST = 256 << 20
# The libraries allocate a table as long as the largest id, whether or not there are tokens in between.
_LARGEST_VOCABULARY = 1 << 24
# Unicode's own normalizations make at most 18 characters of one.
_MOST_GROWTH = 32.0
_MOST_REPLACED = 100
_CPU_S = 20
_WALL_S = 180.0
_MEMORY = 2 << 30
_MEMORY_PER_BYTE = 40
_TRIED = 64


def problem(tree: dict[str, Any]) -> str | None:
    """Returns why a parsed tokenizer.json could take too much memory; None if nothing in it says so."""
    size = tokenizer_json.vocabulary_size(tree)
    if size > _LARGEST_VOCABULARY:
        return f"its ids of tokens reach {size - 1}, allowed: {_LARGEST_VOCABULARY - 1}"
    growth = 1.0
    for part in _parts(tree.get("normalizer")):
        if part.get("type") == "Replace":
            growth *= _growth(part)
        elif part.get("type") == "Prepend" and len(str(part.get("prepend"))) > _MOST_REPLACED:
            return "its normalizer puts a long text before every document"
        elif part.get("type") == "Precompiled" and not _is_charsmap(part.get("precompiled_charsmap")):
            return "the table of its Precompiled normalizer is damaged, or makes a long text of one character"
    if growth > _MOST_GROWTH:
        return f"its normalizer makes up to {growth:.3g} characters of one, allowed: {_MOST_GROWTH:g}"
    return None


def is_plain(tree: dict[str, Any]) -> bool:
    """Whether a tokenizer is byte-level BPE with one of our own patterns and nothing else, which needs no trial."""
    ours = [tokenizer_json.pre_tokenizer(pattern) for pattern in ("gpt2", "gpt4")]
    return tree.get("normalizer") is None and tree.get("pre_tokenizer") in ours and tree["model"].get("type") == "BPE"


@functools.lru_cache(_TRIED)
def try_out(content: bytes, place: str) -> None:
    """Loads a tokenizer in a child process with limits and encodes and decodes texts there.

    Args:
        content: Of the tokenizer.json.
        place: Begins the message.

    Raises:
        DataError: The child crashed, or took too much time or memory.
    """
    root = str(Path(__file__).parents[3])
    environment = {
        **os.environ,
        **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"), "1"),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
    }
    command = [sys.executable, "-m", "pipeline.data.tokenize.limits"]
    try:
        done = subprocess.run(command, input=content, env=environment, capture_output=True, timeout=_WALL_S)
    except subprocess.TimeoutExpired as error:
        raise DataError(f"{place}: the tokenizer did not encode 30 KB of text in {_WALL_S:.0f} s") from error
    if done.returncode != 0:
        said = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
        reason = printable(said[-1])[:200] if said else f"status {done.returncode}"
        raise DataError(
            f"{place}: the tokenizer crashes, or takes more than {_CPU_S} s or {_MEMORY >> 30} GiB for 30 KB of text "
            f"({reason}); use another tokenizer.json"
        )


@contextlib.contextmanager
def named(place: str) -> Iterator[None]:
    """Turns whatever the libraries raise, panics included, into one DataError that names the tokenizer."""
    try:
        yield
    except (PipelineError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of Rust is no Exception
        raise DataError(f"{place}: the tokenizer cannot process this text ({printable(error)[:200]})") from error


def _growth(part: dict[str, Any]) -> float:
    """Returns the most characters that a Replace makes of one."""
    content, pattern = part.get("content"), part.get("pattern")
    literal = pattern.get("String") if isinstance(pattern, dict) else None
    length = len(literal) if isinstance(literal, str) and literal else 1
    return max(1.0, len(content) / length) if isinstance(content, str) else 1.0


def _is_charsmap(text: Any) -> bool:
    """Whether the table of SentencePiece is whole: the size of a trie, the trie, and texts that end in a null byte."""
    try:
        table = base64.b64decode(text or "", validate=True)
    except (binascii.Error, TypeError, ValueError):
        return False
    size = int.from_bytes(table[:4], "little")
    texts = table[4 + size :]
    return size % 4 == 0 and 0 < size <= len(table) - 4 and max(map(len, texts.split(b"\0"))) <= _MOST_REPLACED


def _parts(part: Any, depth: int = 0) -> Iterator[dict[str, Any]]:
    """Yields a normalizer and all inside it."""
    if isinstance(part, dict) and depth < 20:
        yield part
        inner = part.get("normalizers")
        for one in inner if isinstance(inner, list) else []:
            yield from _parts(one, depth + 1)


def _texts() -> Iterator[str]:
    """Yields texts on which a slow expression shows: long runs that almost match, and words of several scripts."""
    for character in string.printable:
        yield character * 100 + "!"
    yield from ("ab" * 300 + "!", " \n" * 300, "x" * 3000, " " * 3000, "0" * 3000, "\u4e2d" * 1000, "e\u0301" * 500)
    yield (
        "The quick brown fox. \u00dcber na\u00efve \u5317\u4eac \u0928\u092e\u0938\u094d\u0924\u0947 \U0001f642\n" * 50
    )


def _trial() -> None:
    from pipeline.data.tokenize.tokenizer import Tokenizer

    content = sys.stdin.buffer.read()
    memory = _MEMORY + _MEMORY_PER_BYTE * len(content)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_S, _CPU_S))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    try:
        tokenizer = Tokenizer(content, "<stdin>", tried=True)
    except DataError:
        return  # the caller meets the same one
    for text in _texts():
        try:
            ids = tokenizer.reference_encode([text])[0]
            tokenizer.encode(text)
            tokenizer.decode(ids)
        except DataError as error:
            if not isinstance(error.__cause__, Exception):  # a panic; otherwise a character that has no token
                sys.exit(str(error))


if __name__ == "__main__":
    _trial()
