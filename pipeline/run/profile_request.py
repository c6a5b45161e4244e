"""What `pipeline profile` asks of a running training: one file of the run folder, which training removes again."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from dataclasses import asdict, dataclass
from typing import Annotated

from pydantic import Field, TypeAdapter

from pipeline.errors import PipelineError, UsageError
from pipeline.files import naming, write_json
from pipeline.run.folder import Run
from pipeline.run.records import read_checked

MOST_STEPS = 1000


@dataclass(frozen=True)
class ProfileRequest:
    """A profile of the next steps."""

    id: Annotated[str, Field(pattern=r"^[0-9]{8}-[0-9]{6}-[0-9a-f]{4}$")]
    """Names the request and the folder of its files."""
    steps: Annotated[int, Field(ge=1, le=MOST_STEPS)]
    ranks: list[Annotated[int, Field(ge=0)]]
    """Those that record."""
    until: float
    """When nobody waits for it any longer, in Unix seconds."""


_FORM = TypeAdapter(ProfileRequest)


def new_request(steps: int, ranks: list[int], wait_s: float) -> ProfileRequest:
    """Returns a request that waits so long for its answer."""
    now = time.time()
    name = f"{time.strftime('%Y%m%d-%H%M%S', time.localtime(now))}-{secrets.token_hex(2)}"
    return ProfileRequest(name, steps, ranks, now + wait_s)


def publish(run: Run, request: ProfileRequest) -> None:
    """Asks the training of a run for a profile.

    Raises:
        UsageError: It is recording one already.
        PipelineError: The run folder cannot be written.
    """
    file = run.profile_request
    other = pending(run)
    if other is not None:
        raise UsageError(f"{file}: another profile is under way, of {other.steps} steps; wait until it is written")
    temp = file.with_name(f".{request.id}.json")
    with naming(file, "cannot be written", "choose a user who may write to the run folder"):
        write_json(temp, asdict(request))
        try:
            if file.exists():  # of a command that was killed
                file.unlink()
            os.link(temp, file)  # unlike a rename, it replaces no request that came in between
        except FileExistsError:
            raise UsageError(f"{file}: another profile was asked for at the same moment; try again") from None
        finally:
            temp.unlink()


def pending(run: Run) -> ProfileRequest | None:
    """Returns the request that waits for an answer; None without one, or if nobody waits for it any longer."""
    try:
        # Opening the folder makes NFS ask the server; otherwise it would answer from its memory that there is no file.
        if run.profile_request.name not in os.listdir(run.profiles):  # noqa: PTH208
            return None
    except FileNotFoundError:
        return None
    try:
        request = read_checked(run.profile_request, run.path, _FORM)
    except PipelineError:
        return None
    return request if time.time() < request.until else None


def withdraw(run: Run, request_id: str) -> None:
    """Removes the request, if it is still this one."""
    with contextlib.suppress(OSError):
        other = pending(run)
        if other is None or other.id == request_id:
            run.profile_request.unlink(missing_ok=True)
