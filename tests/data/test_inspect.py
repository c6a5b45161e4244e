"""`pipeline inspect` shows documents unchanged and counts all of them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.inspect import count_tokens, document_lengths, draw_documents
from pipeline.data.manifest import DatasetManifest
from pipeline.vendor import plotly_js
from tests.data.helpers import SPEECHES, command


def test_inspect_prints_documents_and_writes_a_page(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command("prepare", str(files[0]))
    page = tmp_path / "page.html"
    assert command("inspect", str(files[1]), "--count", "200", "--html", str(page)) == 0
    out = capsys.readouterr().out
    assert out.count("source speeches") == 101 and "<script>alert(1)</script> & co" in out
    html = page.read_text()
    assert "Plotly.newPlot" in html and "<td><code>&#39; &#39;</code></td>" in html
    assert "alert(1)" not in html and "src=" not in html.replace(plotly_js(), "")
    assert not (files[1] / "inspect.html").exists()


def test_inspect_of_nothing_is_an_error(tmp_path: Path, files: tuple[Path, Path]) -> None:
    assert command("inspect", str(tmp_path)) == 1
    command("prepare", str(files[0]))
    assert command("inspect", str(files[1]), "--split", "validation") == 1
    assert command("inspect", str(files[1]), "--split", "test") == 2


@pytest.mark.parametrize("name", ["train.bin", "train.idx"])
@pytest.mark.parametrize("left", [None, 0, 2])
def test_inspect_of_a_damaged_dataset_names_the_file(
    name: str, left: int | None, files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    command("prepare", str(files[0]))
    (file,) = files[1].rglob(name)
    if left is None:
        file.unlink()
    else:
        os.truncate(file, left)
    for count in ("0", "1"):
        assert command("inspect", str(files[1]), "--count", count) == 1
        assert f"pipeline: error: {file}: " in capsys.readouterr().err


def test_drawn_documents_are_whole_and_the_same_for_a_seed(files: tuple[Path, Path]) -> None:
    command("prepare", str(files[0]))
    drawn = draw_documents(files[1], "train", 5, seed=1)
    assert [SPEECHES[d.number] for d in drawn] == [d.text for d in drawn]
    assert drawn == draw_documents(files[1], "train", 5, seed=1) != draw_documents(files[1], "train", 5, seed=2)


def test_the_histogram_counts_every_document(files: tuple[Path, Path]) -> None:
    command("prepare", str(files[0]))
    counts = document_lengths(files[1], DatasetManifest.load(files[1]).splits["train"].shards)
    lengths = np.array([len(t.encode()) + 1 for t in SPEECHES])
    for octave in range(12):
        assert (
            counts[2 * octave : 2 * octave + 2].sum() == ((lengths >= 2**octave) & (lengths < 2 ** (octave + 1))).sum()
        )


def test_every_token_is_counted(files: tuple[Path, Path]) -> None:
    command("prepare", str(files[0]))
    manifest = DatasetManifest.load(files[1])
    (shard,) = manifest.splits["train"].shards
    counts, counted = count_tokens(files[1], manifest, [shard])
    expected = np.bincount(np.fromfile(files[1] / shard.file, "<u2"), minlength=manifest.vocab_size)
    assert counted == shard.tokens and np.array_equal(counts, expected)


def test_the_page_counts_documents_by_length(files: tuple[Path, Path], tmp_path: Path) -> None:
    command("prepare", str(files[0]))
    command("inspect", str(files[1]), "--count", "0", "--html", str(tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text().replace(plotly_js(), "")
    (bars,), _ = json.JSONDecoder().raw_decode(page, page.index("[", page.index("Plotly.newPlot(")))
    lengths = [len(text.encode()) + 1 for text in SPEECHES]
    bounds = [[int(number.replace(",", "")) for number in label.split("–")] for label in bars["x"]]
    assert bars["y"] == [sum(bound[0] <= length <= bound[-1] for length in lengths) for bound in bounds]
    assert sum(bars["y"]) == len(SPEECHES)
