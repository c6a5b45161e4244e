"""The console output of a build: progress, a table, missing parts."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.data.build.build import BuildProgress, prepare
from pipeline.data.build.display import Display
from pipeline.data.manifest import DatasetManifest
from tests.data.helpers import SPEECHES, command, config, jsonl, write


def test_prepare_prints_a_table_with_the_skipped_records(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("prepare", str(files[0])) == 0
    out = " ".join(re.sub(r"[│┃]", " ", capsys.readouterr().out).split())
    manifest = DatasetManifest.load(files[1])
    train = manifest.splits["train"]
    for words in (
        "documents 101 0",
        f"tokens {train.tokens:,} 0",
        f"bytes per token {train.bytes / train.tokens:.2f} -",
        f"longest document, tokens {train.longest:,} 0",
        "empty documents, skipped 1",
        "bad records, skipped 1 missing field 1",
    ):
        assert words in out
    assert train.longest == max(len(t.encode()) for t in SPEECHES) + 1


def test_a_part_says_that_other_parts_are_missing(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert command("prepare", str(files[0]), "data.slice_size_mb=0.001", "--slice", "2/3") == 0
    assert "part 2 of 3" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["1", "0/3", "4/3", "a/b", "1/0", "-1/3", "1/3/5", "²/3", "1/³", "١/٣"])
def test_a_bad_slice_is_a_usage_error(text: str, files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert command("prepare", str(files[0]), "--slice", text) == 2
    assert f"--slice {text}: " in capsys.readouterr().err and not files[1].exists()


def test_a_folder_with_brackets_in_its_name_is_printed_as_it_is(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "[b]o[" / "b]"
    assert command("prepare", str(files[0]), f"data.path={folder}") == 0
    assert command("inspect", str(folder)) == 0
    assert "[b]o[/b]" in "".join(capsys.readouterr().out.split())


def test_ctrl_c_is_one_message_and_a_promised_exit_status(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.data.build.build.wait", interrupted)
        assert command("prepare", str(files[0])) == 1
    message = capsys.readouterr().err
    assert message.startswith("pipeline: interrupted") and message.count("\n") == 1
    assert command("prepare", str(files[0])) == 0


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("pipeline.data.build.display.time.monotonic", lambda: clock[0])
    for terminal in (True, False):
        out = io.StringIO()
        with Display(console=Console(file=out, force_terminal=terminal, width=100)) as display:
            clock[0] += 1000  # of training a tokenizer, which must not count as reading
            for step in range(5):
                display(BuildProgress("slices", step * 60_000_000, 600_000_000))
                clock[0] += 6
            display(BuildProgress("tokenizer", message="[slow] encoder"))
        text = out.getvalue()
        assert "[slow] encoder" in text
        if terminal:
            assert "B/s" in text and "40%" in text
        else:
            assert all(word in text for word in ("120.0MB", "600.0MB", "10.0MB/s", "0:48")) and text.count("MB/s") == 2


@pytest.mark.parametrize("terminal", [True, False])
def test_a_finished_build_shows_no_progress(terminal: bool, tmp_path: Path) -> None:
    text = write(tmp_path / "a.jsonl", jsonl(SPEECHES))
    made = config(tmp_path / "out", [{"name": "s", "paths": [str(text)]}])
    shown = []
    for _ in range(2):
        out = io.StringIO()
        with Display(console=Console(file=out, force_terminal=terminal, width=100)) as display:
            prepare(made, progress=display)
        shown.append(out.getvalue())
    assert ("prepare" in shown[0] and "100%" in shown[0]) == terminal
    assert shown[1] == ""
