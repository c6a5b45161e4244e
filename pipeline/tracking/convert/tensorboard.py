"""Writes an event file for TensorBoard; the only code that imports tensorboard."""

from __future__ import annotations

import io
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from pipeline.files import write_bytes
from pipeline.run.folder import Run
from pipeline.tracking.convert.rows import rows


def write_events(run: Run, folder: Path) -> int:
    """Writes one event file, with the steps and times of training, and returns the number of lines.

    While a run trains, a later file begins with the same bytes, so a running TensorBoard reads on in it.
    """
    content, count = io.BytesIO(), 0
    writer = RecordWriter(content)
    for count, row in enumerate(rows(run), 1):
        if count == 1:
            writer.write(Event(wall_time=row.time, file_version="brain.Event:2").SerializeToString())
        values = [Summary.Value(tag=key, simple_value=value) for key, value in row.values.items()]
        writer.write(Event(wall_time=row.time, step=row.step, summary=Summary(value=values)).SerializeToString())
    write_bytes(folder / "events.out.tfevents.run", content.getvalue())
    return count
