import errno
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from pipeline.run import journal
from pipeline.run.events import Resumed, append


def records(path):
    return [line.record for line in journal.read(path)]


def test_a_torn_last_line_is_ignored_by_readers_and_cut_off_by_the_next_writer(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step":1}\n{"step":2}\n{"step":3,"train/lo')
    assert records(file) == [{"step": 1}, {"step": 2}]
    assert journal.last(file) == {"step": 2}
    with journal.Writer(file) as writer:
        writer.write(journal.encode({"step": 3}))
    assert file.read_bytes() == b'{"step":1}\n{"step":2}\n{"step":3}\n'


def test_a_file_that_is_one_torn_line_becomes_empty(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step":')
    assert records(file) == [] and journal.last(file) is None
    journal.repair(file)
    assert file.read_bytes() == b""


def test_an_event_after_a_torn_one_is_not_swallowed_by_it(tmp_path):
    file = tmp_path / "events.jsonl"
    file.write_bytes(b'{"time":1,"event":"started"}\n{"time":2,"eve')
    append(file, Resumed(step=7))
    assert [(r["event"], r.get("step")) for r in records(file)] == [("started", None), ("resumed", 7)]


def test_the_last_record_is_found_in_a_file_longer_than_a_block(tmp_path):
    file = tmp_path / "metrics.jsonl"
    filler = "x" * 5000
    file.write_bytes(b"".join(journal.encode({"step": i, "filler": filler}) for i in range(500)) + b'{"torn')
    assert journal.last(file)["step"] == 499


def test_numbers_that_are_no_numbers_are_strict_json_and_come_back_as_they_were(tmp_path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    file = tmp_path / "metrics.jsonl"
    file.write_bytes(journal.encode({"step": 1, "a": float("nan"), "b": float("inf"), "c": -float("inf")}))
    assert json.loads(file.read_text(), parse_constant=refuse)["step"] == 1
    (line,) = journal.read(file)
    assert line.record["a"] != line.record["a"] and line.record["b"] == float("inf") == -line.record["c"]
    assert journal.last(file)["b"] == float("inf")
    file.write_text('{"step": 1, "a": NaN}\n')  # as earlier versions wrote it
    (line,) = journal.read(file)
    assert line.record["a"] != line.record["a"]


def test_no_offset_ever_points_into_a_line(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b"".join(journal.encode({"step": i, "name": "é" * i}) for i in range(20)))
    ends = [line.end for line in journal.read(file)]
    for place, end in enumerate(ends):
        assert [line.record["step"] for line in journal.read(file, end)] == list(range(place + 1, 20))


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    file = tmp_path / "metrics.jsonl"
    writer = journal.Writer(file)
    writer.write(journal.encode({"step": 1}))
    real = os.write
    monkeypatch.setattr(journal.os, "write", lambda fd, data: real(fd, data[:5]))
    with pytest.raises(OSError, match="No space left"):
        writer.write(journal.encode({"step": 2}))
    monkeypatch.undo()
    writer.write(journal.encode({"step": 3}))
    writer.close()
    assert records(file) == [{"step": 1}, {"step": 3}]


def test_a_part_of_a_line_that_could_not_be_cut_off_is_cut_off_before_the_next_line(tmp_path, monkeypatch):
    file = tmp_path / "metrics.jsonl"
    writer = journal.Writer(file)
    writer.write(journal.encode({"step": 1}))
    real = os.write

    def refused(fd, size):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(journal.os, "write", lambda fd, data: real(fd, data[:5]))
    monkeypatch.setattr(journal.os, "ftruncate", refused)
    with pytest.raises(OSError, match=re.escape(os.strerror(errno.EIO))):
        writer.write(journal.encode({"step": 2}))
    monkeypatch.undo()
    writer.write(journal.encode({"step": 3}))
    writer.close()
    assert records(file) == [{"step": 1}, {"step": 3}] and len(file.read_bytes().splitlines()) == 2


def test_journal_and_goodput_need_neither_torch_nor_mlflow():
    """A login node has neither, and `pipeline status` runs there."""
    program = (
        "import sys\nfor name in ('torch', 'mlflow', 'deepspeed', 'plotly', 'psutil'): sys.modules[name] = None\n"
        "import pipeline.run.journal, pipeline.tracking.goodput, pipeline.tracking.upload.sync\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr


def test_whatever_the_moment_of_a_kill_9_every_line_is_whole(tmp_path):
    file = tmp_path / "metrics.jsonl"
    program = (
        "import sys\nfrom pathlib import Path\nfrom pipeline.run import journal\n"
        f"path = Path({str(file)!r})\n"
        "last = journal.last(path)\nstep = last['step'] + 1 if last else 0\n"
        "with journal.Writer(path) as writer:\n"
        "    print('ready', flush=True)\n"
        "    while True:\n"
        "        writer.write(journal.encode({'step': step, 'filler': 'y' * 3000}))\n        step += 1\n"
    )
    for attempt in range(5):
        child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
        child.stdout.readline()
        time.sleep(0.02 + 0.013 * attempt)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        steps = [r["step"] for r in records(file)]
        assert steps == list(range(len(steps))) and len(steps) > 0
