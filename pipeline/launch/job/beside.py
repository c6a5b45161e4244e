"""What the host of rank 0 does beside the ranks that train: one thread looks at the run folder every few seconds."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator

from submitit.core.utils import FailedJobError, FailedSubmissionError

from pipeline.errors import PipelineError
from pipeline.launch.job.branches import release
from pipeline.launch.job.evaluations import submit_evaluations
from pipeline.launch.job.messages import SpikesTold
from pipeline.launch.job.spec import Attempt
from pipeline.text_format import echo

_INTERVAL_S = 5.0
# Of the last look. What it misses is done without it: `afterok` starts decays, the last job evaluates.
_LAST_LOOK_S = 30.0


@contextlib.contextmanager
def beside_training(attempt: Attempt, seen: int) -> Iterator[None]:
    """Tells spikes, releases decays and submits evaluations while the block runs, and once after it.

    Args:
        attempt: The attempt; nothing is done beside one that does not train.
        seen: Bytes of events.jsonl that are older.
    """
    looks = _looks(attempt, seen)
    if not looks:
        yield
        return
    ended = threading.Event()
    thread = threading.Thread(target=_watch, args=(looks, ended), name="beside training", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(_LAST_LOOK_S)


def _looks(attempt: Attempt, seen: int) -> dict[str, Callable[[], None]]:
    """Returns the looks by what a failed one leaves undone."""
    looks: dict[str, Callable[[], None]] = {}
    if attempt.stage == "train":
        looks["a decay is not started"] = functools.partial(release, attempt.run, set())
        if attempt.notify is not None:
            looks["spikes are not told"] = SpikesTold(attempt, seen)
        if attempt.run.config().evaluate.every_checkpoint:
            looks["a checkpoint's evaluation is not submitted"] = functools.partial(submit_evaluations, attempt)
    return looks


def _watch(looks: dict[str, Callable[[], None]], ended: threading.Event) -> None:
    told: dict[str, str] = {}
    over = False
    while True:
        for undone, look in looks.items():
            try:
                look()
            except (OSError, PipelineError, FailedJobError, FailedSubmissionError) as error:  # the next look repeats it
                if str(error) != told.get(undone):
                    told[undone] = str(error)
                    echo(f"pipeline: {undone} yet: {error}", sys.stderr)
        if over:
            return
        over = ended.wait(_INTERVAL_S)
