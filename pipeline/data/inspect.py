"""A look at a finished dataset: decoded documents, the lengths of all, the tokens that are most frequent."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.data.manifest import TOKENIZER, Manifest, Shard, check_sizes
from pipeline.data.tokenize.tokenizer import Tokenizer
from pipeline.errors import DataError, UsageError
from pipeline.files import write_text

# Tokens that are counted, at most: the beginnings of all shards, the same of each.
_MOST_COUNTED = 200_000_000
_BINS_AN_OCTAVE = 2
_TOKENS_SHOWN = 50


@dataclass(frozen=True)
class Document:
    """One document of a dataset.

    Attributes:
        number: Its number in the split, from 0.
        source: The source it is from.
        tokens: Its length, the end-of-text token included.
        text: The decoded text.
    """

    number: int
    source: str
    tokens: int
    text: str


def draw_documents(path: str | Path, split: str, count: int, seed: int) -> list[Document]:
    """Documents drawn at random, in the order of the dataset.

    Raises:
        DataError: The split has no documents, or a file of it is missing or has another size.
        UsageError: There is no such split.
    """
    path = Path(path)
    manifest = Manifest.load(path)
    if split not in manifest.splits:
        raise UsageError(f"--split {split}: allowed are {' and '.join(manifest.splits)}")
    shards = manifest.splits[split].shards
    ends = np.cumsum([s.documents for s in shards])
    if not len(ends):
        raise DataError(f"{path}: the {split} split has no documents")
    check_sizes(path, shards, manifest.numpy_dtype)
    tokenizer = Tokenizer.load(path / TOKENIZER)
    total = int(ends[-1])
    numbers = np.sort(np.random.default_rng(seed).choice(total, min(count, total), replace=False))
    documents = []
    for number in numbers.tolist():
        index = int(np.searchsorted(ends, number, side="right"))
        shard = shards[index]
        place = number - int(ends[index - 1] if index else 0)
        start, stop = np.memmap(path / shard.index, "<u8", "r")[place : place + 2].tolist()
        tokens = np.memmap(path / shard.file, manifest.numpy_dtype, "r")[start:stop]
        documents.append(Document(number, shard.source, stop - start, tokenizer.decode(tokens[:-1])))
    return documents


def write_page(path: str | Path, out: Path) -> None:
    """Writes a self-contained HTML page about a dataset.

    Args:
        path: The dataset folder.
        out: The page.

    Raises:
        DataError: A file of the dataset is missing or has another size.
    """
    path = Path(path)
    manifest = Manifest.load(path)
    check_sizes(path, manifest.shards, manifest.numpy_dtype)
    tokenizer = Tokenizer.load(path / TOKENIZER)
    parts = [f"<h1>{html.escape(str(path))}</h1>", f"<p>dataset {manifest.digest}, {manifest.tokens:,} tokens</p>"]
    for name, split in manifest.splits.items():
        if not split.shards:
            continue
        counts, counted = count_tokens(path, manifest, split.shards)
        parts += [
            f"<h2>{name}: {split.documents:,} documents, {split.tokens:,} tokens</h2>",
            "<h3>Tokens a document</h3>",
            _histogram(document_lengths(path, split.shards)),
            f"<h3>The most frequent tokens of {counted:,}</h3>",
            _frequent(counts, counted, tokenizer),
        ]
    write_text(out, _PAGE.format(title=html.escape(path.name), body="\n".join(parts)))


def document_lengths(path: Path, shards: Sequence[Shard]) -> npt.NDArray[np.int64]:
    """Documents by length: how many have 1, 2-3, 4-5, 6-7 ... tokens, `_BINS_AN_OCTAVE` bins for each doubling."""
    counts = np.zeros(64 * _BINS_AN_OCTAVE, np.int64)
    for shard in shards:
        lengths = np.diff(np.fromfile(path / shard.index, "<u8").astype(np.int64))
        bins = np.floor(np.log2(lengths) * _BINS_AN_OCTAVE + 1e-9).astype(np.int64)
        counts += np.bincount(bins, minlength=len(counts))
    return counts


def count_tokens(path: Path, manifest: Manifest, shards: Sequence[Shard]) -> tuple[npt.NDArray[np.int64], int]:
    """How often each token id occurs, and in how many tokens."""
    counts = np.zeros(manifest.vocab_size, np.int64)
    share = max(1, _MOST_COUNTED // len(shards))
    counted = 0
    for shard in shards:
        tokens = np.memmap(path / shard.file, manifest.numpy_dtype, "r")[:share]
        for start in range(0, len(tokens), 1 << 22):
            counts += np.bincount(tokens[start : start + (1 << 22)], minlength=len(counts))
        counted += len(tokens)
    return counts, counted


def _histogram(counts: npt.NDArray[np.int64]) -> str:
    used = np.flatnonzero(counts)
    first, last = int(used[0]), int(used[-1])
    shown = counts[first : last + 1]
    width, height, bar = 24 * len(shown) + 60, 220, 22
    rows = []
    for place, count in enumerate(shown.tolist()):
        tall = 160 * count / int(shown.max())
        low, high = (2 ** ((first + place + k) / _BINS_AN_OCTAVE) for k in (0, 1))
        x = 40 + 24 * place
        rows.append(
            f'<rect x="{x}" y="{180 - tall:.1f}" width="{bar}" height="{tall:.1f}">'
            f"<title>{low:,.0f} to {high:,.0f} tokens: {count:,} documents</title></rect>"
        )
        if (first + place) % _BINS_AN_OCTAVE == 0:
            rows.append(f'<text x="{x}" y="196" transform="rotate(40 {x} 196)">{low:,.0f}</text>')
    rows.append(f'<text x="2" y="16">{int(shown.max()):,} documents</text>')
    return f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img">{"".join(rows)}</svg>'


def _frequent(counts: npt.NDArray[np.int64], counted: int, tokenizer: Tokenizer) -> str:
    rows = [
        f"<tr><td>{i}</td><td><code>{html.escape(repr(tokenizer.decode([i])))}</code></td>"
        f"<td>{counts[i]:,}</td><td>{counts[i] / counted:.2%}</td></tr>"
        for i in np.argsort(-counts, kind="stable")[:_TOKENS_SHOWN].tolist()
        if counts[i]
    ]
    unused = int((counts == 0).sum())
    return (
        "<table><tr><th>id</th><th>token</th><th>times</th><th>share</th></tr>"
        + "".join(rows)
        + f"</table><p>{unused:,} of {len(counts):,} tokens do not occur.</p>"
    )


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #222; background: #fff }}
rect {{ fill: #3b6ea5 }} text {{ font-size: 11px; fill: #555 }}
td, th {{ padding: 0 .8em; text-align: right }} code {{ white-space: pre }}
</style></head><body>
{body}
</body></html>
"""
