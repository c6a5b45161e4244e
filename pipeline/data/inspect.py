"""Shows a finished dataset: decoded documents, a histogram of document lengths, the most frequent tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go

from pipeline.data.layout import TOKENIZER
from pipeline.data.manifest import DatasetManifest, Shard, check_sizes
from pipeline.data.shard_maps import ShardMaps, mapped
from pipeline.data.tokenize.tokenizer import Tokenizer
from pipeline.errors import DataError, UsageError
from pipeline.files import write_text
from pipeline.vendor import plotly_js

# At most this many tokens of a split are counted: the beginnings of all its shards, the same number of each.
_MOST_COUNTED = 200_000_000
_COUNTED_AT_ONCE = 1 << 22
_BINS_PER_OCTAVE = 2
_TOKENS_SHOWN = 50
_CURE = "remove the dataset and prepare it again"

# Whatever a token or a name contains, the page can load nothing and send nothing.
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline'; \
style-src 'unsafe-inline'; img-src data: blob:; font-src data:">
<title>{{ path.name }}</title><link rel="icon" href="data:,"><style>
body { font: 15px/1.5 sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #222; background: #fff }
td, th { padding: 0 .8em; text-align: right } code { white-space: pre }
</style><script>{{ plotly | safe }}</script></head><body>
<h1>{{ path }}</h1><p>dataset {{ manifest.digest }}, {{ "{:,}".format(manifest.tokens) }} tokens</p>
{% for part in parts %}
<h2>{{ part.name }}: {{ "{:,}".format(part.documents) }} documents, {{ "{:,}".format(part.tokens) }} tokens</h2>
<h3>Document lengths</h3>
{{ part.lengths | safe }}
<h3>The most frequent tokens of {{ "{:,}".format(part.counted) }}</h3>
<table><tr><th>id</th><th>token</th><th>count</th><th>share</th></tr>
{% for id, text, count in part.frequent %}
<tr><td>{{ id }}</td><td><code>{{ text }}</code></td><td>{{ "{:,}".format(count) }}</td>
<td>{{ "{:.2%}".format(count / part.counted) }}</td></tr>
{% endfor %}
</table><p>{{ "{:,}".format(part.unused) }} of {{ "{:,}".format(manifest.vocab_size) }} tokens do not occur.</p>
{% endfor %}
</body></html>
"""


@dataclass(frozen=True)
class Document:
    """One document of a dataset."""

    number: int
    """Its number in the split, from 0."""
    source: str
    """The name of its source."""
    tokens: int
    """Its length, the end-of-text token included."""
    text: str
    """The decoded text."""


def draw_documents(
    path: str | Path, split: str, count: int, seed: int, token_folder: str | None = None
) -> list[Document]:
    """Returns random documents of a split, in the order of the dataset.

    Raises:
        DataError: The split has no documents, or one of its files is missing or has another size.
        UsageError: There is no such split.
    """
    path = Path(path)
    manifest = DatasetManifest.load(path)
    if split not in manifest.splits:
        raise UsageError(f"--split {split}: allowed are {' and '.join(manifest.splits)}")
    shards = manifest.splits[split].shards
    ends = np.cumsum([s.documents for s in shards])
    if not len(ends):
        raise DataError(f"{path}: the {split} split has no documents")
    tokens_in = manifest.tokens_in(path, token_folder)
    check_sizes(path, shards, manifest.numpy_dtype, tokens_in=tokens_in)
    maps = ShardMaps(tokens_in or path, path, manifest.numpy_dtype, len(shards))
    tokenizer = Tokenizer.load(path / TOKENIZER, inside=path)
    total = int(ends[-1])
    numbers = np.sort(np.random.default_rng(seed).choice(total, min(count, total), replace=False))
    documents = []
    for number in numbers.tolist():
        index = int(np.searchsorted(ends, number, side="right"))
        shard = shards[index]
        first = number - int(ends[index - 1] if index else 0)
        start, stop = mapped(path / shard.index, "<u8")[first : first + 2].tolist()
        tokens = maps.tokens(shard)[start:stop]
        has_end = tokens[-1] == manifest.end_of_text_id  # not always, if others made the tokens
        text = tokenizer.decode(tokens[:-1] if has_end else tokens)
        documents.append(Document(number, shard.source, stop - start, text))
    return documents


def write_page(path: str | Path, out: Path, token_folder: str | None = None) -> None:
    """Writes a self-contained HTML page about a dataset to `out`.

    Raises:
        DataError: A file of the dataset is missing or has another size.
    """
    path = Path(path)
    manifest = DatasetManifest.load(path)
    tokens_in = manifest.tokens_in(path, token_folder)
    check_sizes(path, manifest.shards, manifest.numpy_dtype, tokens_in=tokens_in)
    tokenizer = Tokenizer.load(path / TOKENIZER, inside=path)
    parts = []
    for name, split in manifest.splits.items():
        if not split.shards:
            continue
        counts, counted = count_tokens(tokens_in or path, manifest, split.shards)
        parts.append(
            {
                "name": name,
                "documents": split.documents,
                "tokens": split.tokens,
                "lengths": _length_chart(document_lengths(path, split.shards), name),
                "counted": counted,
                "frequent": _most_frequent(counts, tokenizer),
                "unused": int((counts == 0).sum()),
            }
        )
    template = jinja2.Environment(autoescape=True).from_string(_PAGE)
    write_text(out, template.render(path=path, manifest=manifest, parts=parts, plotly=plotly_js()))


def document_lengths(path: Path, shards: Sequence[Shard]) -> npt.NDArray[np.int64]:
    """Counts documents by their length in tokens, in `_BINS_PER_OCTAVE` logarithmic bins for each doubling."""
    counts = np.zeros(64 * _BINS_PER_OCTAVE, np.int64)
    for shard in shards:
        index = np.fromfile(path / shard.index, "<u8")
        lengths = np.diff(index.astype(np.int64))
        if index[0] != 0 or index[-1] != shard.tokens or (lengths <= 0).any():
            raise DataError(f"{path / shard.index}: is damaged: it is no list of growing offsets; {_CURE}")
        bins = np.floor(np.log2(lengths) * _BINS_PER_OCTAVE + 1e-9).astype(np.int64)
        counts += np.bincount(bins, minlength=len(counts))
    return counts


def count_tokens(path: Path, manifest: DatasetManifest, shards: Sequence[Shard]) -> tuple[npt.NDArray[np.int64], int]:
    """Returns the count of each token id and the number of tokens that were counted."""
    counts = np.zeros(manifest.vocab_size, np.int64)
    share = max(1, _MOST_COUNTED // len(shards))
    waiting: list[npt.NDArray[Any]] = []
    held = counted = 0
    for shard in shards:
        most = min(share, shard.tokens)
        tokens = np.fromfile(path / shard.file, manifest.numpy_dtype, count=most, offset=shard.offset)
        counted += len(tokens)
        for start in range(0, len(tokens), _COUNTED_AT_ONCE):
            waiting.append(tokens[start : start + _COUNTED_AT_ONCE])
            held += len(waiting[-1])
            # Not shard by shard: each count costs as much as the vocabulary, and there may be many small shards.
            if held >= _COUNTED_AT_ONCE:
                counts += _counts(path, waiting, len(counts))
                waiting, held = [], 0
    return counts + _counts(path, waiting, len(counts)), counted


def _counts(path: Path, tokens: Sequence[npt.NDArray[Any]], vocab_size: int) -> npt.NDArray[np.int64]:
    found = np.bincount(np.concatenate([np.zeros(0, np.uint8), *tokens]).astype(np.int64), minlength=vocab_size)
    if len(found) > vocab_size:
        raise DataError(f"{path}: holds the token id {len(found) - 1}, beyond its vocabulary; {_CURE}")
    return found


def _length_chart(counts: npt.NDArray[np.int64], split: str) -> str:
    """Returns the histogram of `document_lengths` as an HTML element."""
    used = np.flatnonzero(counts)
    edges = [math.ceil(2 ** (edge / _BINS_PER_OCTAVE)) for edge in range(used[0], used[-1] + 2)]
    bars = {
        (f"{low:,}" if low == high - 1 else f"{low:,}–{high - 1:,}"): int(count)
        for low, high, count in zip(edges, edges[1:], counts[used[0] :], strict=False)
        if low < high
    }
    figure = go.Figure(go.Bar(x=list(bars), y=list(bars.values())))
    figure.update_traces(hovertemplate="%{x} tokens: %{y:,} documents<extra></extra>")
    figure.update_layout(template="plotly_white", height=320, margin={"l": 64, "r": 16, "t": 16, "b": 64})
    figure.update_xaxes(title="tokens per document", type="category")
    figure.update_yaxes(title="documents")
    settings: dict[str, Any] = {"displayModeBar": False, "responsive": True}
    return str(figure.to_html(full_html=False, include_plotlyjs=False, div_id=f"lengths-{split}", config=settings))


def _most_frequent(counts: npt.NDArray[np.int64], tokenizer: Tokenizer) -> list[tuple[int, str, int]]:
    """Returns id, text and count of the most frequent tokens."""
    ids = np.argsort(-counts, kind="stable")[:_TOKENS_SHOWN].tolist()
    return [(i, repr(tokenizer.decode([i])), int(counts[i])) for i in ids if counts[i]]
