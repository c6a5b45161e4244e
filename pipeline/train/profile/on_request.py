"""Answers requests for a profile: rank 0 finds one, all ranks agree on the step, the chosen ones record."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch._C._distributed_c10d import Store

from pipeline.errors import StopRequested
from pipeline.run.events import Event, ProfileBegan, Profiled
from pipeline.run.folder import Run
from pipeline.run.profile_request import ProfileRequest, pending, withdraw
from pipeline.run.world import World
from pipeline.train.profile.recorder import Recorder
from pipeline.train.ranks.activity import Activity

WRITE_S = 600.0
# How long the files are waited for at the end; a start that was asked to stop may have little time.
FINISHED_S = 60.0
STOPPED_S = 2.0
_PAUSE_S = 0.05
# The number of a request only has to differ from the one before it.
_NUMBERS = 3


class ProfileOnRequest:
    """Profiles of one start.

    Args:
        run: The run.
        world: This process's place.
        device: Where it trains.
        store: What all ranks share.
        activity: Where the phases of this rank are named.
        record: Records an event.
    """

    def __init__(
        self,
        run: Run,
        world: World,
        device: torch.device,
        store: Store,
        activity: Activity,
        record: Callable[[Event], None],
    ) -> None:
        self.asked = 0
        """Number of the request that rank 0 passes on with each step; 0 on the other ranks."""
        self._run, self._world, self._device, self._store = run, world, device, store
        self._activity, self._record = activity, record
        self._agreed = 0  # number of the last request that all ranks know
        self._due: ProfileRequest | None = None
        self._left: int | None = None  # steps still to record, on all ranks; None while nothing is recorded
        self._recorder: Recorder | None = None
        self._writer: threading.Thread | None = None
        self._open: ProfileRequest | None = None  # on rank 0: the request that is being answered
        self._until = 0.0
        self._ending = False
        self._lock = threading.Lock()

    # ---- rank 0, in a thread ---------------------------------------------------------------

    def look(self) -> None:
        """Looks for a request, or whether the one under way is answered; called every second on rank 0."""
        with self._lock, contextlib.suppress(OSError, RuntimeError):  # folder or store is gone, which others report
            if self._open is not None:
                self._collect()
            elif not self._ending:
                self._take(pending(self._run))

    def _take(self, request: ProfileRequest | None) -> None:
        if request is None:
            return
        outside = [rank for rank in request.ranks if rank >= self._world.size]
        if outside:
            self._answer(request, [], [f"there is no rank {outside[0]}: this start has {self._world.size} ranks"])
            return
        number = self.asked % _NUMBERS + 1
        for rank in request.ranks:
            self._store.delete_key(_outcome(number, rank))
        self._store.set(_asked(number), json.dumps(asdict(request)))
        self._open, self._until = request, 0.0
        self.asked = number

    def _collect(self) -> None:
        """Answers once all chosen ranks have written their files, or have had the time to."""
        request = self._open
        assert request is not None
        keys = [_outcome(self.asked, rank) for rank in request.ranks]
        late = bool(self._until) and time.monotonic() > self._until
        if not late and not self._store.check(keys):
            return
        files, problems = [], []
        for rank, key in zip(request.ranks, keys, strict=True):
            if not self._store.check([key]):
                problems.append(f"rank {rank} has written nothing within {WRITE_S:.0f} s")
                continue
            outcome = json.loads(self._store.get(key))
            files += outcome["files"]
            problems += [f"rank {rank}: {problem}" for problem in outcome["problems"]]
        self._open = None
        self._answer(request, files, problems)

    def _answer(self, request: ProfileRequest, files: list[str], problems: list[str]) -> None:
        self._record(Profiled(request=request.id, files=files, problems=problems))
        withdraw(self._run, request.id)

    # ---- every rank, in the loop -----------------------------------------------------------

    def agree(self, number: int) -> None:
        """Hears the number that rank 0 passed on with a step; every rank hears the same after the same step."""
        if number in (0, self._agreed):
            return
        self._agreed = number
        self._due = ProfileRequest(**json.loads(self._store.get(_asked(number))))

    def begin_step(self, step: int) -> None:
        """Begins, continues or ends a recording before the next step."""
        if self._left == 0:
            self._stop()
        if self._due is not None:
            self._start(self._due, step)
            self._due = None
        if self._left is not None:
            self._left -= 1
        if self._recorder is not None:
            self._recorder.begin_step(step)

    def close(self, wait_s: float) -> None:
        """Ends what is being recorded; the files hold the steps until here.

        Args:
            wait_s: How long to wait for the files, and on rank 0 for those of the other ranks.
        """
        until = time.monotonic() + wait_s
        self._stop()
        if self._writer is not None:
            self._writer.join(wait_s)
        with self._lock:
            self._ending = True
            if self._due is not None or self._agreed != self.asked:
                self._give_up("training ended before the profile began")
        while self._open is not None and time.monotonic() < until:
            self.look()
            time.sleep(_PAUSE_S)
        with self._lock:
            self._give_up(f"training ended, and the files were not written within {wait_s:.0f} s")

    @contextlib.contextmanager
    def answered(self) -> Iterator[None]:
        """Answers at the end of the block, however it ends, a request that is under way."""
        try:
            yield
        except StopRequested:
            self.close(STOPPED_S)
            raise
        except Exception:
            self.close(0.0)  # the other ranks may be gone
            raise
        self.close(FINISHED_S)

    def _give_up(self, why: str) -> None:
        if self._open is not None:
            self._answer(self._open, [], [why])
            self._open = None

    def _start(self, request: ProfileRequest, step: int) -> None:
        self._left = request.steps
        if self._world.is_first:
            self._record(ProfileBegan(request=request.id, step=step))
        if self._world.rank not in request.ranks:
            return
        recorder = Recorder(self._run.profiles / request.id, self._world.rank, self._device)
        try:
            recorder.start()
        except Exception as error:  # whatever a profiler may raise must not end the training
            self._report([], [_words(error)])
            return
        self._recorder, self._activity.named = recorder, True

    def _stop(self) -> None:
        if self._left is None:
            return
        self._left, self._until = None, time.monotonic() + WRITE_S
        recorder, self._recorder = self._recorder, None
        if recorder is None:
            return
        self._activity.named = False
        try:
            write = recorder.stop()
        except Exception as error:
            self._report([], [_words(error)])
            return
        # Training continues meanwhile: a trace of a large model takes seconds to write.
        self._writer = threading.Thread(target=self._write, args=(write,), name="profile", daemon=True)
        self._writer.start()

    def _write(self, write: Callable[[], list[Path]]) -> None:
        try:
            self._report([str(file) for file in write()], [])
        except Exception as error:
            self._report([], [_words(error)])

    def _report(self, files: list[str], problems: list[str]) -> None:
        outcome: dict[str, Any] = {"files": files, "problems": problems}
        with contextlib.suppress(RuntimeError):  # rank 0 is gone, and nobody waits
            self._store.set(_outcome(self._agreed, self._world.rank), json.dumps(outcome))


def _asked(number: int) -> str:
    return f"profile/{number}"


def _outcome(number: int, rank: int) -> str:
    return f"profile/{number}/{rank}"


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if not isinstance(error, OSError) else str(error)
