"""The helper process (see `helper.py`): `python -m pipeline.tracking.helper_process RUN URI ATTEMPT`."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from pathlib import Path

from pipeline.errors import PipelineError, in_words
from pipeline.run.folder import Run
from pipeline.text_format import PlainFormatter
from pipeline.tracking.helper import EVERYTHING_SENT, POINTS_LEFT
from pipeline.tracking.system import NodeSampler, node_name
from pipeline.tracking.upload.sync import note_killed
from pipeline.tracking.upload.uploader import Uploader

_log = logging.getLogger("pipeline.tracking")

_LAST_ROUND_S = 20.0  # for the remaining points of a killed training


def main(folder: str, uri: str, attempt: int) -> int:
    """Samples this node and feeds the store at `uri`, if any, until this start ends; returns the exit status."""
    handler = logging.StreamHandler()
    handler.setFormatter(PlainFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    run = Run(Path(folder))
    closing = threading.Event()
    told: list[bytes] = []

    def listen() -> None:
        told.append(sys.stdin.buffer.read())  # returns when the training closes or dies
        if not told[0]:
            with contextlib.suppress(OSError, PipelineError):  # `pipeline sync` and the next start note it too
                note_killed(run, attempt)
            threading.Timer(_LAST_ROUND_S, os._exit, [POINTS_LEFT]).start()
        sampler.close()
        closing.set()

    sampler = NodeSampler(run, node_name())
    threading.Thread(target=listen, name="end-of-training", daemon=True).start()
    if not uri:
        closing.wait()
        return EVERYTHING_SENT
    try:
        config = run.config()
    except (OSError, PipelineError) as error:
        logging.getLogger("pipeline.tracking").warning(
            "MLflow is not fed: %s; run `pipeline sync` later", in_words(error)
        )
        return POINTS_LEFT
    sent = Uploader(run, config, uri, closing).work()
    return EVERYTHING_SENT if sent else POINTS_LEFT


if __name__ == "__main__":
    status = main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    # A normal exit would wait for a timer or a request that no longer matters.
    os._exit(status)
