"""A manifest from anyone is one error that names it, or describes files of its own folder in bounded numbers."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config.sections import Config
from pipeline.data.build.build import prepare
from pipeline.data.dataset import open_splits
from pipeline.data.inspect import draw_documents, write_page
from pipeline.data.layout import MANIFEST, SLICE_RECORD
from pipeline.data.manifest import DatasetManifest
from pipeline.data.verify import verify_dataset
from pipeline.errors import DataError
from tests.data.helpers import a_shard
from tests.yardstick import in_plain_starts

Change = Callable[[dict[str, Any]], object]


def tamper(folder: Path, change: Change) -> Path:
    """Changes a manifest and gives it a digest of its own, as whoever makes a dataset can."""
    file = folder / MANIFEST
    tree = json.loads(file.read_bytes())
    tree.pop("digest")
    change(tree)
    canonical = json.dumps(tree, sort_keys=True, separators=(",", ":"))
    file.write_text(json.dumps({**tree, "digest": hashlib.sha256(canonical.encode()).hexdigest()}))
    return file


MALFORMED: dict[str, Change] = {
    "absolute file": lambda tree: tree["shards"][0].update(file="/etc/passwd"),
    "file above": lambda tree: tree["shards"][0].update(file="slices/../../secret"),
    "hidden file": lambda tree: tree["shards"][0].update(index=".ssh/id"),
    "file with an escape": lambda tree: tree["shards"][0].update(file="a\x1b[31m"),
    "file with a null": lambda tree: tree["shards"][0].update(file="a\x00b"),
    "source with a line break": lambda tree: tree["shards"][0].update(source="a\nb"),
    "unknown split": lambda tree: tree["shards"][0].update(split="test"),
    "tokens of text": lambda tree: tree["shards"][0].update(tokens="5"),
    "tokens below zero": lambda tree: tree["shards"][0].update(tokens=-5),
    "endless tokens": lambda tree: tree["shards"][0].update(tokens=2**70),
    "documents missing": lambda tree: tree["shards"][0].pop("documents"),
    "a field more": lambda tree: tree["shards"][0].update(more=1),
    "shards a mapping": lambda tree: tree.update(shards={}),
    "shard a number": lambda tree: tree["shards"].append(3),
    "dtype of objects": lambda tree: tree.update(dtype="object"),
    "huge vocabulary": lambda tree: tree.update(vocab_size=2**40),
    "sources missing": lambda tree: tree.pop("sources"),
    "bad a list": lambda tree: tree["sources"][0].update(bad=[1]),
    "empty of text": lambda tree: tree["sources"][0].update(empty="1"),
    "settings a number": lambda tree: tree.update(settings=1),
    "sources of settings unnamed": lambda tree: tree["settings"].update(sources=[{}]),
    "digest of the tokenizer a list": lambda tree: tree.update(tokenizer_digest=[]),
    "a key more": lambda tree: tree.update(more=1),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_manifest_is_one_error_that_names_it(case: str, copy: Path) -> None:
    file = tamper(copy, MALFORMED[case])
    with pytest.raises(DataError, match=f"^{file}: ") as caught:
        DatasetManifest.load(copy)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b'{"a": 1' + b"0" * 5000 + b"}", b"\xff\xfe"])
def test_a_file_that_is_no_manifest_is_one_error_that_names_it(content: bytes, copy: Path) -> None:
    (copy / MANIFEST).write_bytes(content)
    with pytest.raises(DataError, match=f"^{copy / MANIFEST}: "):
        DatasetManifest.load(copy)


@pytest.mark.parametrize("kind", ["link", "fifo", "device"])
@pytest.mark.parametrize("which", ["manifest", "tokenizer", "tokens", "index"])
def test_links_out_of_a_dataset_fifos_and_devices_are_refused(
    copy: Path, tmp_path: Path, which: str, kind: str
) -> None:
    shard = a_shard(copy)
    file = {"manifest": copy / MANIFEST, "tokenizer": copy / "tokenizer.json", "tokens": shard,
            "index": shard.with_suffix(".idx")}[which]  # fmt: skip
    elsewhere = file.rename(tmp_path / "elsewhere")
    {"link": lambda: file.symlink_to(elsewhere), "fifo": lambda: os.mkfifo(file),
     "device": lambda: file.symlink_to("/dev/zero")}[kind]()  # fmt: skip
    for read in (open_splits, verify_dataset):
        with pytest.raises(DataError, match=str(file)):
            read(copy)


def test_a_linked_folder_of_slices_is_refused_but_not_a_link_to_the_dataset(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(copy)
    assert open_splits(tmp_path / "latest")["train"].stream.tokens
    (copy / "slices").rename(tmp_path / "slices")
    (copy / "slices").symlink_to(tmp_path / "slices")
    with pytest.raises(DataError, match=f"^{copy}/slices/"):
        open_splits(copy)


def test_an_index_that_does_not_grow_and_a_token_beyond_the_vocabulary_are_named(copy: Path, tmp_path: Path) -> None:
    shard = a_shard(copy)
    index = np.fromfile(shard.with_suffix(".idx"), "<u8")
    index[::-1].tofile(shard.with_suffix(".idx"))
    with pytest.raises(DataError, match=f"^{shard.with_suffix('.idx')}: "):
        write_page(copy, tmp_path / "page.html")
    index.tofile(shard.with_suffix(".idx"))
    tokens = np.fromfile(shard, "<u2")
    np.full_like(tokens, 60_000).tofile(shard)
    with pytest.raises(DataError, match=f"^{copy}: .*60000"):
        write_page(copy, tmp_path / "page.html")


RECORDS: dict[str, Change] = {
    "tokens of text": lambda tree: tree["shards"][0].update(tokens="5"),
    "file outside": lambda tree: tree["shards"][0].update(file="../../secret"),
    "piece a number": lambda tree: tree["pieces"].append(1),
    "piece with more": lambda tree: tree["pieces"][0].update(more=1),
    "stop of text": lambda tree: tree["pieces"][-1].update(stop="9"),
    "bad of text": lambda tree: tree.update(bad={"a": "b"}),
    "records of a fraction": lambda tree: tree.update(records=1.5),
}


@pytest.mark.parametrize("case", RECORDS)
def test_a_malformed_record_of_a_slice_is_one_error_that_names_it(case: str, made: Config, copy: Path) -> None:
    file = next((copy / "slices").glob(f"*/{SLICE_RECORD}"))
    tree = json.loads(file.read_bytes())
    RECORDS[case](tree)
    file.write_text(json.dumps(tree))
    (copy / MANIFEST).unlink()
    with pytest.raises(DataError, match=f"^{file}: "):
        prepare(made.model_copy(update={"data": made.data.model_copy(update={"path": str(copy)})}))


@pytest.mark.slow
def test_a_hundred_thousand_shards_are_inspected_in_seconds(copy: Path, tmp_path: Path) -> None:
    shard = a_shard(copy)
    count, files = 100_000, 50_000  # a file has at most 65,000 names
    folder = copy / "slices" / "many"
    folder.mkdir()
    for number in range(files):
        os.link(shard, folder / f"{number}.bin")
        os.link(shard.with_suffix(".idx"), folder / f"{number}.idx")

    def multiply(tree: dict[str, Any]) -> None:
        one = next(s for s in tree["shards"] if s["file"] == str(shard.relative_to(copy)))
        tree["shards"] = [
            {**one, "file": f"slices/many/{n % files}.bin", "index": f"slices/many/{n % files}.idx"}
            for n in range(count)
        ]
        tree["vocab_size"] = 200_000

    tamper(copy, multiply)

    def inspect() -> float:
        began = time.process_time()
        assert len(draw_documents(copy, "train", 3, 0)) == 3
        write_page(copy, tmp_path / "page.html")
        return time.process_time() - began

    assert in_plain_starts(inspect, rounds=1) < 400  # some 200: 20 to 40 s
