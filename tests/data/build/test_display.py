"""What a person sees: progress, a table, documents, a page."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from pipeline.config.load import dump_config
from pipeline.data.build.build import Progress, prepare
from pipeline.data.build.display import Display, parse_slice
from pipeline.data.inspect import document_lengths, draw_documents
from pipeline.data.manifest import Manifest
from pipeline.errors import UsageError
from tests.data.helpers import command, config, documents, jsonl, write

TEXTS = [*documents(100, seed=4), "<script>alert(1)</script> & co"]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A config file and the dataset folder it names."""
    text = write(tmp_path / "a.jsonl", jsonl(TEXTS) + b"{}\n" + jsonl([""]))
    entry = {"name": "speeches", "paths": [str(text)], "split": "train"}
    made = config(tmp_path / "out", [entry], on_bad="skip", max_bad_fraction=0.5)
    return write(tmp_path / "c.yaml", dump_config(made).encode()), tmp_path / "out"


def test_prepare_prints_a_table_with_what_was_left_out(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("prepare", str(files[0])) == 0
    out = " ".join(re.sub(r"[│┃]", " ", capsys.readouterr().out).split())
    manifest = Manifest.load(files[1])
    train = manifest.splits["train"]
    for words in (
        "documents 101 0",
        f"tokens {train.tokens:,} 0",
        f"bytes a token {train.bytes / train.tokens:.2f} -",
        f"longest document, tokens {train.longest:,} 0",
        "empty documents, skipped 1",
        "bad records, skipped 1 missing field 1",
    ):
        assert words in out
    assert train.longest == max(len(t.encode()) for t in TEXTS) + 1


def test_a_part_says_what_is_missing(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert command("prepare", str(files[0]), "data.slice_size_mb=0.001", "--slice", "2/3") == 0
    assert "part 2 of 3 is done; other parts are still missing" in capsys.readouterr().out
    assert command("prepare", str(files[0]), "--slice", "4/3") == 2
    assert "allowed: I/N" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["1", "0/3", "4/3", "a/b", "1/0", "-1/3", "1/3/5", "²/3", "1/³", "١/٣"])
def test_a_bad_slice_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="--slice"):
        parse_slice(text)
    assert parse_slice("2/3") == (2, 3) and parse_slice(None) is None


def test_inspect_prints_documents_and_writes_a_page(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command("prepare", str(files[0]))
    page = tmp_path / "page.html"
    assert command("inspect", str(files[1]), "--count", "200", "--html", str(page)) == 0
    out = capsys.readouterr().out
    assert out.count("source speeches") == 101 and "<script>alert(1)</script> & co" in out
    html = page.read_text()
    assert "<svg" in html and "The most frequent tokens" in html and "&#x27; &#x27;" in html
    assert "<script" not in html and "http" not in html
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


def test_a_folder_with_brackets_in_its_name_is_printed_as_it_is(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "[b]o[" / "b]"
    assert command("prepare", str(files[0]), f"data.path={folder}") == 0
    assert command("inspect", str(folder)) == 0
    assert "[b]o[/b]" in "".join(capsys.readouterr().out.split())


def test_drawn_documents_are_whole_and_the_same_for_a_seed(files: tuple[Path, Path]) -> None:
    command("prepare", str(files[0]))
    drawn = draw_documents(files[1], "train", 5, seed=1)
    assert [TEXTS[d.number] for d in drawn] == [d.text for d in drawn]
    assert drawn == draw_documents(files[1], "train", 5, seed=1) != draw_documents(files[1], "train", 5, seed=2)


def test_the_histogram_counts_every_document(files: tuple[Path, Path]) -> None:
    command("prepare", str(files[0]))
    counts = document_lengths(files[1], Manifest.load(files[1]).splits["train"].shards)
    lengths = np.array([len(t.encode()) + 1 for t in TEXTS])
    for octave in range(12):
        assert (
            counts[2 * octave : 2 * octave + 2].sum() == ((lengths >= 2**octave) & (lengths < 2 ** (octave + 1))).sum()
        )


def test_verify_says_what_it_compared(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    command("prepare", str(files[0]))
    assert command("verify", str(files[1])) == 0
    assert "all 3 files" in capsys.readouterr().out
    (shard,) = files[1].rglob("train.bin")
    shard.write_bytes(shard.read_bytes()[::-1])
    assert command("verify", str(files[1])) == 1
    assert str(shard) in capsys.readouterr().err
    assert command("verify", str(files[0].parent)) == 2


def test_verify_knows_a_dataset_by_its_manifest(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    command("prepare", str(files[0]))
    (files[1] / "plan.json").unlink()
    assert command("verify", str(files[1])) == 0
    assert "all 3 files" in capsys.readouterr().out
    (files[1] / "manifest.json").write_text("{}")
    assert command("verify", str(files[1])) == 1


def test_ctrl_c_is_one_message_and_a_promised_exit_status(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.data.build.build.wait", interrupted)
        assert command("prepare", str(files[0])) == 1
    err = capsys.readouterr().err
    assert err.startswith("pipeline: interrupted") and err.count("\n") == 1
    assert command("prepare", str(files[0])) == 0


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("pipeline.data.build.display.time.monotonic", lambda: clock[0])
    for terminal in (True, False):
        out = io.StringIO()
        with Display(console=Console(file=out, force_terminal=terminal, width=100)) as display:
            clock[0] += 1000  # of training a tokenizer, which say nothing about the speed of reading
            for step in range(5):
                display(Progress("slices", step * 60_000_000, 600_000_000))
                clock[0] += 6
            display(Progress("tokenizer", message="[slow] encoder"))
        text = out.getvalue()
        assert "[slow] encoder" in text
        if terminal:
            assert "B/s" in text and "40%" in text
        else:
            assert "prepare 120 of 600 MB, 10.0 MB/s, 48 s left" in text and text.count("MB/s") == 2


@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_is_shown_where_there_is_nothing_to_do(terminal: bool, tmp_path: Path) -> None:
    text = write(tmp_path / "a.jsonl", jsonl(TEXTS))
    made = config(tmp_path / "out", [{"name": "s", "paths": [str(text)]}])
    shown = []
    for _ in range(2):
        out = io.StringIO()
        with Display(console=Console(file=out, force_terminal=terminal, width=100)) as display:
            prepare(made, progress=display)
        shown.append(out.getvalue())
    assert ("prepare" in shown[0] and "100%" in shown[0]) == terminal
    assert shown[1] == ""


def test_the_progress_of_a_build_ends_at_the_size_of_its_sources(tmp_path: Path) -> None:
    text = write(tmp_path / "a.jsonl", jsonl(TEXTS))
    seen: list[Progress] = []
    prepare(config(tmp_path / "out", [{"name": "s", "paths": [str(text)]}], slice_size_mb=0.001), progress=seen.append)
    slices = [p for p in seen if p.phase == "slices"]
    assert seen[0].phase == "tokenizer" and seen[-1].phase == "done"
    assert {p.total for p in slices} == {text.stat().st_size}
    assert max(p.done for p in slices) >= text.stat().st_size
