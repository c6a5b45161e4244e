"""The output of a run's jobs: all attempts in order, as one stream."""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import PipelineError, UsageError
from pipeline.files import naming, open_regular
from pipeline.launch.slurm import job_records
from pipeline.launch.slurm.job_records import Job
from pipeline.launch.watch.restarts import why_begun
from pipeline.run.folder import Run

_NAME = re.compile(r"attempt_(\d+)_rank_(\d+)\.log$")
# The file of a job's first task also receives the messages of the batch script.
_MESSAGES = "_0_log.err"
_LONGEST_MESSAGE = 300
_POLL_S = 0.5
# Slurm's controller serves all users.
_ASK_S = 5.0
# submitit's own lines in the file that holds Slurm's messages.
_SUBMITIT_LINE = re.compile(r"^submitit (INFO|WARNING)|^\s*$")


@dataclass(frozen=True)
class LogFile:
    """The output of one rank in one attempt."""

    path: Path
    stage: str
    job: str
    attempt: int
    rank: int

    def title(self, run: Run) -> str:
        """Returns the line above it, which says why an attempt that was not the first began."""
        why = why_begun(run, self.job, self.attempt)
        again = f"; it began because {why}" if why else ""
        return f"==> {self.stage}, job {self.job}, attempt {self.attempt}, rank {self.rank}{again} <==\n"


def log_files(run: Run, rank: int = 0) -> list[LogFile]:
    """Returns the files of a rank, in the order in which the jobs were submitted and the attempts began.

    Jobs of one process, such as the slices of prepare, show their only rank.
    """
    return [
        file for job in job_records.jobs(run) for task in _tasks(run, job) for file in _files_of(run, job, task, rank)
    ]


def printed(run: Run, rank: int = 0) -> Iterator[str]:
    """Yields all output so far, with a title before each attempt and Slurm's own messages at the end of a job.

    Raises:
        UsageError: There is no output.
    """
    anything = False
    for job in job_records.jobs(run):
        for task in _tasks(run, job):
            for file in _files_of(run, job, task, rank):
                anything = True
                yield file.title(run)
                yield _text(run, file.path)
            for message in _slurm_messages(run, task, rank):
                anything = True
                yield message
    if not anything:
        raise UsageError(f"{run.path}: no job has printed anything yet{_ranks_with_output(run)}")


def follow(run: Run, rank: int, ended: Callable[[], bool]) -> Iterator[str]:
    """Yields all output so far and all that follows, attempt after attempt, until no job of the run waits or runs."""
    positions: dict[Path, int] = {}
    current: Path | None = None
    asked = -math.inf
    while True:
        last_round = False
        if time.monotonic() - asked >= _ASK_S:
            asked, last_round = time.monotonic(), ended()
        for file in log_files(run, rank):
            with open_regular(file.path, run.path) as source:
                source.seek(positions.get(file.path, 0))
                new = source.read()
            if not new:
                continue
            if file.path != current:
                yield file.title(run)
                current = file.path
            positions[file.path] = positions.get(file.path, 0) + len(new)
            yield new.decode(errors="replace")
        if last_round:
            for job in job_records.last_chain(run):
                for task in _tasks(run, job):
                    yield from _slurm_messages(run, task, rank)
            return
        time.sleep(_POLL_S)


def _tasks(run: Run, job: Job) -> list[str]:
    """Returns the ids of a job's tasks that have printed something; its own id if it is a plain job."""
    if job.tasks == 1:
        return [job.id]
    found = (path.name.removesuffix(_MESSAGES) for home in _homes(run) for path in home.glob(f"{job.id}_*{_MESSAGES}"))
    names = {*found, *(path.name for path in run.logs.glob(f"{job.id}_*"))}
    return sorted(names, key=lambda name: _natural(Path(name)))


def _files_of(run: Run, job: Job, task: str, rank: int) -> Iterator[LogFile]:
    named = [
        (path, int(match[1]), int(match[2]))
        for path in sorted((run.logs / task).glob("attempt_*.log"), key=_natural)
        if (match := _NAME.search(path.name))
    ]
    for path, attempt, first in named:
        numbers = sorted(number for _, of, number in named if of == attempt)
        # Of many ranks, those of a node share the file of its first one.
        share = numbers[1] - numbers[0] if len(numbers) > 1 else 1
        if first <= rank < first + share or job.stage != "train":
            yield LogFile(path, job.stage, task, attempt, first)


def _slurm_messages(run: Run, task: str, rank: int) -> Iterator[str]:
    """Yields what Slurm, the batch script and a rank's launcher said: time limits, cancellations, failed starts."""
    names = dict.fromkeys((f"{task}{_MESSAGES}", f"{task}_{rank}_log.err"))
    for path in (home / name for home in _homes(run) for name in names):
        lines = _text(run, path).splitlines() if path.exists() else []
        shown = [line for line in lines if not _SUBMITIT_LINE.match(line)]
        if shown:
            who = "Slurm and the batch script" if path.name.endswith(_MESSAGES) else f"the launcher of rank {rank}"
            yield f"==> {who}, job {task} <==\n"
            yield "\n".join(shown) + "\n"


def last_message(run: Run, task: str) -> str:
    """Returns the last line that Slurm or the batch script wrote about a job; empty if they wrote nothing."""
    for path in (home / f"{task}{_MESSAGES}" for home in _homes(run)):
        with contextlib.suppress(PipelineError, OSError):
            lines = [line for line in _text(run, path).splitlines() if not _SUBMITIT_LINE.match(line)]
            if lines:
                return lines[-1][:_LONGEST_MESSAGE]
    return ""


def _text(run: Run, path: Path) -> str:
    inside = run.path if path.is_relative_to(run.path) else path.parent
    with naming(path, "cannot be read"), open_regular(path, inside) as source:
        return source.read().decode(errors="replace")


def _homes(run: Run) -> list[Path]:
    """Returns the folders where the jobs of a run keep their files: in the run and in sweeps beside it."""
    return [run.launch, *run.path.parent.glob("*-sweep*/launch")]


def _natural(path: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", path.name)]


def _ranks_with_output(run: Run) -> str:
    found = (_NAME.search(path.name) for path in run.logs.rglob("attempt_*.log"))
    ranks = sorted({int(match[2]) for match in found if match})
    return f"; ranks with output: {', '.join(map(str, ranks))}" if ranks else ""
