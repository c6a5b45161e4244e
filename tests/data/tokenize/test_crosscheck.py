"""A sample of every slice is encoded a second time, and a difference stops the build."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.build.build import prepare
from pipeline.data.read.documents import Documents
from pipeline.data.tokenize import crosscheck
from pipeline.data.tokenize.tokenizer import Tokenizer
from pipeline.data.tokenize.tokenizer_json import compose_bytes
from pipeline.errors import DataError
from tests.data.helpers import END, TOKENIZER_TEXTS, config, jsonl, one_source, save_tokenizer, trained, write


def test_every_build_is_checked_against_tokenizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = write(tmp_path / "a.jsonl", jsonl(TOKENIZER_TEXTS))
    made = config(
        tmp_path / "out",
        [{"name": "s", "paths": [str(text)], "split": "train"}],
        tokenizer={"kind": "bpe"},
        slice_size_mb=0.01,
    )
    manifest = prepare(made)
    slices = [json.loads(p.read_text()) for p in (tmp_path / "out").rglob("slice.json")]
    assert len(slices) > 3 and all(s["cross_checked"] >= 5 for s in slices)
    assert manifest.sources[0]["cross_checked"] == sum(s["cross_checked"] for s in slices)

    def off_by_one(self: Tokenizer, texts: list[str]) -> list[list[int]]:
        return [[*range(len(t)), 7] for t in texts]

    monkeypatch.setattr(Tokenizer, "reference_encode", off_by_one)
    other = config(tmp_path / "other", made.model_dump()["data"]["sources"], tokenizer={"kind": "bpe"})
    with pytest.raises(DataError, match=r"gigatoken and tokenizers .*differently"):
        prepare(other)
    assert not list((tmp_path / "other").rglob("*.bin"))


def test_the_stored_ids_of_long_documents_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = write(tmp_path / "a.jsonl", jsonl([f"chapter {i} of a long book. " * 800 for i in range(40)]))
    encode = Tokenizer.encode_batch

    def reversed_batch(self: Tokenizer, batch: Documents, parallel: bool = False) -> Any:
        ids, offsets = encode(self, batch, parallel)
        return (ids[::-1].copy() if len(batch) > 1 else ids), offsets

    monkeypatch.setattr(Tokenizer, "encode_batch", reversed_batch)
    with pytest.raises(DataError, match="'chapter .* differently"):
        prepare(config(tmp_path / "out", [one_source(text)], tokenizer={"kind": "bpe"}))
    assert not list((tmp_path / "out").rglob("*.bin"))


def test_a_long_document_whose_beginning_is_encoded_otherwise_by_itself_is_compared_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = Tokenizer(trained().encode(), "here")
    long = Documents.of([b"one two " * 3000])
    ids, offsets = made.encode_batch(long)
    encode = Tokenizer.encode_batch
    seen: list[int] = []
    reference = made.reference_encode

    def cut_matters(self: Tokenizer, batch: Documents, parallel: bool = False) -> Any:
        ids, offsets = encode(self, batch, parallel)
        return np.roll(ids, 1), offsets

    monkeypatch.setattr(made, "reference_encode", lambda texts: seen.extend(map(len, texts)) or reference(texts))
    monkeypatch.setattr(Tokenizer, "encode_batch", cut_matters)
    crosscheck.CrossCheck(made, 0, "here").offer(long, ids, offsets)
    assert seen == [24_000]


def test_the_sample_is_random_bounded_and_the_same_for_a_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Tokenizer.load(save_tokenizer(tmp_path, compose_bytes([END])))
    seen: list[list[str]] = []
    reference = made.reference_encode
    monkeypatch.setattr(made, "reference_encode", lambda texts: seen.append(list(texts)) or reference(texts))
    many = Documents.of([f"{i} ".encode() * 100 for i in range(500)])
    for seed in (1, 1, 2):
        check = crosscheck.CrossCheck(made, seed, "here")
        for _ in range(3):
            check.offer(many, *made.encode_batch(many))
        check.finish()
    assert seen[0] == seen[1] != seen[2]
    assert sum(map(len, seen[0])) <= 33_000 and len(seen[0]) == 16
