"""`pipeline adopt` and `export-data`: what they print, write and refuse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.data.adopt.megatron import open_megatron
from pipeline.data.manifest import DatasetManifest
from tests.data.adopt.foreign import DOCUMENTS, TEXTS, flat, tokens_of, write_megatron, write_raw
from tests.data.helpers import command


@pytest.fixture
def adopted(tmp_path: Path) -> Path:
    write_megatron(tmp_path / "in" / "web.bin")
    arguments = ["--output", str(tmp_path / "out"), "--tokenizer", str(tokens_of(tmp_path))]
    assert command("adopt", "megatron", f"web={tmp_path}/in/web", *arguments, "--validation-fraction", "0.1") == 0
    return tmp_path / "out"


def test_it_shows_decoded_documents_and_the_lines_of_a_config(
    capsys: pytest.CaptureFixture[str], adopted: Path
) -> None:
    shown = capsys.readouterr().out
    assert sum(text.split("\n")[0].rstrip() in shown for text in TEXTS) >= 3
    assert f"token_folder: {adopted.parent / 'in'}" in shown and "web" in shown


def test_verify_and_inspect_want_the_folder_of_the_tokens(capsys: pytest.CaptureFixture[str], adopted: Path) -> None:
    assert command("verify", str(adopted)) == 1
    assert "--token-folder" in capsys.readouterr().err
    assert command("verify", str(adopted), "--token-folder", str(adopted.parent / "in")) == 0
    assert command("inspect", str(adopted), "--token-folder", str(adopted.parent / "in")) == 0
    shown = capsys.readouterr().out
    assert sum(text.split("\n")[0].rstrip() in shown for text in TEXTS) >= 3


def test_what_is_exported_has_the_documents_of_the_dataset(adopted: Path, tmp_path: Path) -> None:
    tokens = str(adopted.parent / "in")
    assert command("export-data", str(adopted), "--output", str(tmp_path / "x"), "--token-folder", tokens) == 0
    index = (tmp_path / "x" / "validation-000000.idx").read_bytes()
    count = len(DatasetManifest.load(adopted).splits["validation"].shards)
    assert count == 1
    documents = DatasetManifest.load(adopted).splits["validation"].documents
    lengths = np.frombuffer(index, "<i4", documents, 34)
    places = np.frombuffer(index, "<i8", documents, 34 + 4 * documents)
    assert lengths.tolist() == [len(d) for d in DOCUMENTS[-documents:]]
    found = np.fromfile(tmp_path / "x" / "validation-000000.bin", "<i4")
    assert found[places[0] // 4 :].tolist() == flat(DOCUMENTS[-documents:])
    assert open_megatron(tmp_path / "in" / "web.bin").tokens == len(found)


def test_a_full_folder_and_a_missing_type_are_usage_errors_and_other_tokens_failures(tmp_path: Path) -> None:
    path, tokenizer = str(write_raw(tmp_path / "a.bin", [[1, 999, 256]])), str(tokens_of(tmp_path))
    out = ["--output", str(tmp_path / "out"), "--tokenizer", tokenizer]
    assert command("adopt", "raw", path, *out) == 2
    assert command("adopt", "other", path, *out) == 2
    assert command("adopt", "raw", path, *out, "--dtype", "uint16") == 1
    assert not (tmp_path / "out").exists()
    assert command("adopt", "raw", path, "--output", str(tmp_path), "--tokenizer", tokenizer, "--dtype", "uint16") == 2
