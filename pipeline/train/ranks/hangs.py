"""Hangs: a collective that does not end leaves the stacks of all ranks, and the rank that did not come is named."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from torch._C import _distributed_c10d

from pipeline.run.events import Event, Hang, HangEnded
from pipeline.run.folder import Run, step_name
from pipeline.text_format import duration
from pipeline.train.ranks.activity import Activity, Roster

# Ranks are heard every two seconds. A rank that is stopped counts as lost after a minute: it is to be reported before.
SILENCE_S = 10.0
HANG_S = 30.0
# Nothing in a training step takes five times as long as the longest that anything in a step took before.
TIMES_LONGEST = 5
# The first step compiles, and NCCL connects.
FIRST_STEP_S = 300.0

_RECORDED = "500"


class HangWatch:
    """Looks on rank 0 whether any rank still moves.

    Args:
        run: The run.
        roster: What the ranks are doing.
        tell: Makes every rank, rank 0 included, leave its stacks in this folder.
        record: Records an event.
        show: Shows a line to the person who watches.
        first: Finished steps at the beginning of this start.
    """

    def __init__(
        self,
        run: Run,
        roster: Roster,
        tell: Callable[[Path], None],
        record: Callable[[Event], None],
        show: Callable[[str], None],
        first: int,
    ) -> None:
        self._run, self._roster, self._tell, self._record, self._show = run, roster, tell, record, show
        self._places: object = None
        self._moved = time.monotonic()
        self._longest_s = 0.0
        self._first = first
        self.hang: str | None = None
        """The hang that has lasted until now, in a sentence."""

    def look(self) -> None:
        """Looks once; called every second by a thread."""
        now, seen = time.monotonic(), self._roster.all()
        places = [one.doing.place for one in seen.values()]
        step = max(one.doing.step for one in seen.values())
        if places != self._places:
            self._move(now, places, counts=step > self._first)
            return
        usual = FIRST_STEP_S if step == self._first else max(HANG_S, TIMES_LONGEST * self._longest_s)
        # A rank whose threads say nothing is not merely slow.
        limit = HANG_S if any(now - one.at > SILENCE_S for one in seen.values()) else usual
        saving = all(one.doing.phase == "checkpoint" for one in seen.values())
        if self.hang is None and not saving and now - self._moved > limit:
            self._report(step, now - self._moved)

    def _move(self, now: float, places: object, counts: bool) -> None:
        if self.hang is not None:
            self._record(HangEnded(seconds=round(now - self._moved, 1)))
            self._show(f"the ranks continue after {duration(now - self._moved)}")
        elif counts:
            self._longest_s = max(self._longest_s, now - self._moved)
        self._places, self._moved, self.hang = places, now, None

    def _report(self, step: int, waited_s: float) -> None:
        folder = self._run.hangs / step_name(step)
        missing = self._roster.missing(SILENCE_S)
        named = [
            f"rank {rank} on {one.host}" + (f" (in {one.doing.phase})" if one.doing.phase else "")
            for rank, one in missing.items()
        ]
        who = f"{', '.join(named)} did not come" if named else "all ranks have come equally far (the network hangs?)"
        self.hang = f"no rank has moved for {duration(waited_s)} after step {step}: {who}; stacks are in {folder}"
        self._tell(folder)
        self._record(
            Hang(
                step=step,
                ranks=list(missing),
                hosts=[one.host for one in missing.values()],
                phases=[one.doing.phase for one in missing.values()],
                waited_s=round(waited_s, 1),
                path=str(folder),
            )
        )
        self._show(self.hang)


def leave_stacks(folder: Path, rank: int, activity: Activity) -> None:
    """Writes what all threads of this rank are doing, and the collectives it began, into two files of the folder.

    A disk that takes no file must not end a run that may only be slow.
    """
    with contextlib.suppress(OSError, RuntimeError):
        folder.mkdir(parents=True, exist_ok=True)
        doing = activity.now()
        with (folder / f"rank_{rank}.txt").open("w") as file:
            file.write(
                f"rank {rank} on {socket.gethostname()}, process {os.getpid()}, after step {doing.step}, "
                f"in {doing.phase or 'no phase'}, {doing.collectives} collectives begun\n\n"
            )
            file.flush()
            faulthandler.dump_traceback(file)
        (folder / f"rank_{rank}_collectives.json").write_bytes(_recorded_collectives())


def record_collectives() -> None:
    """Switches PyTorch's flight recorder on, for NCCL and gloo; before the process group exists."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", _RECORDED)


def _recorded_collectives() -> bytes:
    """Returns the newest collectives of the flight recorder as JSON; NCCL has a recorder of its own."""
    nccl = dist.is_initialized() and dist.get_backend() == "nccl"
    dump = getattr(_distributed_c10d, "_dump_nccl_trace_json" if nccl else "_dump_fr_trace_json")
    return bytes(dump())
