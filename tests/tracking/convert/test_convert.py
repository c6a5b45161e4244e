"""What other trackers read of a run is what metrics.jsonl holds, however often it is converted."""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.errors import PipelineError, UsageError
from pipeline.run import journal
from pipeline.run.folder import Run
from pipeline.tracking.convert.convert import convert
from tests.data.helpers import command
from tests.tracking.support import make_run, of_journal

_BLOCK = 32768


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made, _ = make_run(tmp_path, "none")
    record(made, 1, 30)
    return made


def record(run: Run, first: int, last: int) -> None:
    """Appends lines as a training would, with a value that is not finite and a validation of its own line."""
    for step in range(first, last + 1):
        loss = math.nan if step == 7 else 5 / step
        journal.append(run.metrics_file, {"step": step, "time": 1.75e9 + step / 4, "train/loss": loss, "tokens": step})
        if step % 10 == 0:
            journal.append(run.metrics_file, {"step": step, "time": 1.75e9 + step / 4 + 0.1, "val/loss": 6 / step})


def test_tensorboard_reads_every_point_and_follows_the_training(run: Run) -> None:
    shown = convert(run, "tensorboard")
    assert shown.startswith(f"{run.path}/tensorboard: 33 lines") and f"--logdir {run.path.parent}" in shown
    reader = EventAccumulator(str(run.tensorboard), size_guidance={"scalars": 0})
    for last in (30, 40):
        reader.Reload()
        assert set(reader.Tags()["scalars"]) == {"train/loss", "val/loss", "tokens"}
        for key, points in of_journal(run).items():
            read = [(e.step, round(e.wall_time * 1000), e.value) for e in reader.Scalars(key)]
            assert [r[:2] for r in read] == [p[:2] for p in points] and points[-1][0] == last
            assert [r[2] for r in read] == pytest.approx([p[2] for p in points], rel=1e-6, nan_ok=True)
        record(run, 31, 40)
        convert(run, "tensorboard")
    assert len(list(run.tensorboard.iterdir())) == 1


def test_an_offline_run_of_weights_and_biases_has_every_point_and_is_replaced(run: Run) -> None:
    ids = set()
    for last in (30, 40):
        shown = convert(run, "wandb-offline")
        assert f"wandb sync {run.path}/wandb" in shown
        (file,) = run.wandb.glob("*.wandb")
        ids.add(file.name)
        points: dict[str, list[tuple[int, float]]] = {}
        for found in records(file):
            if found.HasField("run"):
                about = {item.key: item.value_json for item in found.run.config.update}
                assert found.run.project == "tests" and found.run.display_name == "try"
                assert about["model.d_model"] == "16"
            for key, step, value in history(found):
                points.setdefault(key, []).append((step, value))
        assert points["val/loss"] == [(step, pytest.approx(6 / step)) for step in range(10, last + 1, 10)]
        assert [step for step, _ in points["train/loss"]] == list(range(1, last + 1))
        # The lines of a step are one row of W&B, at the time of the last.
        assert points["_timestamp"][0] == (1, 1.75e9 + 0.25) and points["_timestamp"][9][1] == 1.75e9 + 2.6
        record(run, 31, 40)
    assert len(ids) == 1, "the same id, so an upload replaces the earlier one"
    assert not list(run.path.glob(".wandb.*"))


def records(file: Path) -> Iterator[Any]:
    """Yields the records of W&B's file: protobuf in LevelDB's log format, behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, whole = file.read_bytes(), 7, b""
    while place < len(data):
        if (left := _BLOCK - place % _BLOCK) < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(whole)
            whole = b""


def history(found: Any) -> Iterator[tuple[str, int, float]]:
    """Yields key, step and value of the metrics of a record."""
    if found.HasField("history"):
        row = {"/".join(item.nested_key) or item.key: item.value_json for item in found.history.item}
        step = found.history.step.num
        yield from ((key, step, float(value.strip('"'))) for key, value in row.items() if key != "_wandb")


@pytest.mark.parametrize(("to", "package"), [("tensorboard", "tensorboard"), ("wandb-offline", "wandb")])
def test_a_missing_package_is_named_in_one_sentence(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], to: str, package: str
) -> None:
    for name in [name for name in sys.modules if name.startswith(("pipeline.tracking.convert.", f"{package}."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert command("sync", str(run.path), "--to", to) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"pip install {package}" in line


def test_nothing_is_written_without_metrics_nor_through_a_link(tmp_path: Path, run: Run) -> None:
    run.tensorboard.symlink_to(tmp_path)
    with pytest.raises(PipelineError, match="is a link"):
        convert(run, "tensorboard")
    run.metrics_file.unlink()
    with pytest.raises(UsageError, match="nothing to convert"):
        convert(run, "tensorboard")


def test_a_store_of_mlflow_is_refused_beside_another_tracker(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("sync", str(run.path), "--to", "tensorboard", "--uri", "sqlite:///x.db") == 2
    assert "--uri names a store of MLflow" in capsys.readouterr().err
