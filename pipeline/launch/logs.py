"""What the jobs of a run printed: all attempts, in order, as one stream."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UsageError
from pipeline.launch import records
from pipeline.run import Run

_NAME = re.compile(r"attempt_(\d+)_rank_(\d+)\.log$")
_POLL_S = 0.5
# Slurm's controller serves everybody.
_ASK_S = 5.0
# submitit's own lines in the file that holds Slurm's messages.
_CHATTER = re.compile(r"^submitit (INFO|WARNING)|^\s*$")


@dataclass(frozen=True)
class LogFile:
    """One attempt's output of one rank.

    Attributes:
        path: The file.
        title: Which stage, job, attempt and rank it is.
    """

    path: Path
    title: str


def log_files(run: Run, rank: int = 0) -> list[LogFile]:
    """The files of a rank, in the order in which the jobs were submitted and the attempts began.

    Jobs of one process, such as the slices of prepare, show their only rank.
    """
    found: list[LogFile] = []
    for job in records.jobs(run):
        folders = sorted(run.logs.glob(f"{job.id}_*"), key=_natural) if job.tasks > 1 else [run.logs / job.id]
        for folder in folders:
            for path in sorted(folder.glob("attempt_*.log"), key=_natural):
                match = _NAME.search(path.name)
                if match and (int(match[2]) == rank or job.stage != "train"):
                    title = f"{job.stage}, job {folder.name}, attempt {match[1]}, rank {match[2]}"
                    found.append(LogFile(path, title))
    return found


def printed(run: Run, rank: int = 0) -> Iterator[str]:
    """Everything so far, with a title before each attempt and Slurm's own messages at the end of a job.

    Raises:
        UsageError: There is nothing.
    """
    files = log_files(run, rank)
    if not files:
        raise UsageError(f"{run.path}: no job has printed anything{_ranks_there(run)}")
    for index, file in enumerate(files):
        yield f"==> {file.title} <==\n"
        yield file.path.read_text(encoding="utf-8", errors="replace")
        if index + 1 == len(files) or files[index + 1].path.parent != file.path.parent:
            yield from _words_of_slurm(run, file.path.parent.name)


def follow(run: Run, rank: int, ended: Callable[[], bool]) -> Iterator[str]:
    """Everything so far and everything that comes, attempt after attempt, until the run has ended.

    Args:
        run: The run.
        rank: Whose output.
        ended: Whether no job of the run waits or runs any more.
    """
    positions: dict[Path, int] = {}
    current: Path | None = None
    asked = -math.inf
    while True:
        last_round = False
        if time.monotonic() - asked >= _ASK_S:
            asked, last_round = time.monotonic(), ended()
        for file in log_files(run, rank):
            with file.path.open("rb") as source:
                source.seek(positions.get(file.path, 0))
                new = source.read()
            if not new:
                continue
            if file.path != current:
                yield f"==> {file.title} <==\n"
                current = file.path
            positions[file.path] = positions.get(file.path, 0) + len(new)
            yield new.decode(errors="replace")
        if last_round:
            return
        time.sleep(_POLL_S)


def _words_of_slurm(run: Run, job: str) -> Iterator[str]:
    """What Slurm and the batch script said: time limits, cancellations, lost nodes."""
    path = next((home / f"{job}_0_log.err" for home in _homes(run) if (home / f"{job}_0_log.err").exists()), None)
    if path is None:
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    said = [line for line in lines if not _CHATTER.match(line)]
    if said:
        yield f"==> Slurm and the batch script, job {job} <==\n"
        yield "\n".join(said) + "\n"


def _homes(run: Run) -> list[Path]:
    """Where the jobs of a run keep their files: in the run, or in the folder of the sweep it belongs to."""
    return [run.launch, *(p for p in run.path.parent.glob("*-sweep/launch") if run.name.startswith(p.parent.name[:-6]))]


def _natural(path: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", path.name)]


def _ranks_there(run: Run) -> str:
    files = [path for path in run.logs.rglob("attempt_*.log") if _NAME.search(path.name)]
    ranks = sorted({int(m[2]) for path in files if (m := _NAME.search(path.name))})
    return f"; ranks that have: {', '.join(map(str, ranks))}" if ranks else ""
