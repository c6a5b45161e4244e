"""Where the documents of windows start is the same by the tokens, by the index, and as the documents were written."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config.sections import Config
from pipeline.data.adopt import pieces
from pipeline.data.dataset import open_splits
from pipeline.data.order.batches import BatchReader
from pipeline.data.order.documents import document_starts
from pipeline.data.order.packing import make_packing
from pipeline.data.order.validation import validation_windows
from tests.data.adopt.foreign import DOCUMENTS, flat
from tests.data.adopt.test_adopt import adopted

CONTEXT, LONG = 64, 512
WITHOUT_ENDS = [document[:-1] for document in DOCUMENTS]


@pytest.fixture(params=["whole", "pieces"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An adopted dataset without end-of-text tokens, of one shard or of many."""
    if request.param == "pieces":
        monkeypatch.setattr(pieces, "PIECE_BYTES", 4000)
    adopted(tmp_path, "olmo", found=WITHOUT_ENDS)
    return tmp_path


def begins_of(stream: list[int], rows: list[list[int]]) -> list[list[int]]:
    """The place where each token's document begins, of rows that occur in the stream only once."""
    borders = {0, *np.cumsum([len(document) for document in WITHOUT_ENDS]).tolist()}
    text = bytes(stream)
    found = []
    for row in rows:
        first = text.index(bytes(row))
        begin, places = 0, []
        for place in range(len(row)):
            begin = place if first + place in borders else begin
            places.append(begin)
        found.append(places)
    return found


def test_without_end_of_text_the_index_tells_documents_apart(folder: Path, made: Config) -> None:
    splits = open_splits(folder / "out", token_folder=str(folder / "in"))
    data = made.data.model_copy(update={"path": str(folder / "out"), "token_folder": str(folder / "in")})
    reader = BatchReader(splits["train"], data, seed=1, context_length=CONTEXT, batch_size=16, document_starts=True)
    held_out = validation_windows(splits["validation"], CONTEXT, documents=True)[0]
    x, _, starts = reader.batch(3, 2, 16)
    assert starts.dtype == torch.int64 and (starts.diff(dim=1) > 0).any()
    assert starts.tolist() == begins_of(flat(WITHOUT_ENDS), x.tolist())
    x, _, starts = held_out.batch(1, 4)
    assert starts.tolist() == begins_of(flat(WITHOUT_ENDS), x.tolist())


def test_packed_pieces_are_told_apart_without_end_of_text(folder: Path, made: Config) -> None:
    make_packing(folder / "out", LONG + 1)
    dataset = open_splits(folder / "out", token_folder=str(folder / "in"))["train"]
    update = {"path": str(folder / "out"), "token_folder": str(folder / "in"), "packing": "best_fit"}
    data = made.data.model_copy(update=update)
    reader = BatchReader(dataset, data, seed=1, context_length=LONG, batch_size=16, document_starts=True)
    whole = {tuple(document) for document in WITHOUT_ENDS}
    parts = []
    for index in range(4):
        for ids, targets, starts in zip(*(t.tolist() for t in reader.batch(index, 0, 16)), strict=True):
            used = LONG if -1 not in targets else targets.index(-1) + 1
            borders = [*sorted(set(starts[:used])), used]
            parts += [tuple(ids[a:b]) for a, b in itertools.pairwise(borders) if used < LONG or b < used]
            assert starts[used:] == list(range(used, LONG)), "padding sees nothing"
    short = [part for part in parts if len(part) < LONG]
    assert len(short) > 20
    ends = [document[-len(part) :] for part in short for document in whole if document[-len(part) :] == part]
    assert len(ends) >= len(short), "each piece ends where its document does"


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_the_index_and_the_end_of_text_tokens_tell_the_same(packing: str, tmp_path: Path, made: Config) -> None:
    adopted(tmp_path, "olmo")
    make_packing(tmp_path / "out", CONTEXT + 1)
    dataset = open_splits(tmp_path / "out", token_folder=str(tmp_path / "in"))["train"]
    update = {"path": str(tmp_path / "out"), "token_folder": str(tmp_path / "in"), "packing": packing}
    data = made.data.model_copy(update=update)
    by_tokens, by_index = (
        BatchReader(dataset, data, seed=1, context_length=CONTEXT, batch_size=16, document_starts=True) for _ in "ab"
    )
    assert by_index._documents is not None
    by_index._documents._by_index = True
    for index in range(3):
        x, _, starts = by_index.batch(index, 0, 16)
        assert torch.equal(starts, document_starts(x, 256)) and (starts > 0).any()
        assert torch.equal(starts, by_tokens.batch(index, 0, 16)[2])
