"""Pins: with a file beside a checkpoint, another run or a waiting job protects it from the retention of its own run.

    checkpoints/step_00001000.pin.long-decay.1a2b3c4d.json

A pin names the folder of its holder, who removes it, and counts until a date; without that folder it counts for a day.
"""

from __future__ import annotations

import contextlib
import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import Field, Strict, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic takes that of typing from Python 3.12 on

from pipeline.errors import PipelineError
from pipeline.files import nearest_existing, read_json, sha256_bytes, write_json
from pipeline.text_format import printable

DAYS = 14.0
"""How long a pin counts unless its holder renews it: longer than a job usually waits in a queue."""

_UNBORN_S = 86_400.0  # a holder may pin long before its folder exists, and check a large checkpoint in between
_NAME = re.compile(r"(step_[0-9]{8,15})\.pin\..+\.json")
_Moment = Annotated[float, Strict(), Field(ge=0, lt=1e11)]


class _Content(TypedDict):
    holder: Annotated[str, Strict()]
    above: Annotated[str, Strict()]
    inode: Annotated[int, Strict()]
    since: _Moment
    until: _Moment


_CONTENT = TypeAdapter(_Content)


@dataclass(frozen=True)
class Pin:
    """A pin that was found."""

    file: Path
    checkpoint: Path
    """The checkpoint that it protects."""
    holder: str
    """The folder of the run or job that wants it; empty if the file is damaged."""
    dead: str | None
    """Why it no longer counts; None while it does."""

    def line(self) -> str:
        """Returns one line for the user."""
        if self.dead is not None:
            return f"{self.checkpoint.name}: no longer, {self.dead}; remove {self.file}"
        return f"{self.checkpoint.name}: by {self.holder}"


def pin(checkpoint: Path, holder: Path, days: float = DAYS) -> Path:
    """Protects a published checkpoint for a holder, who has only one pin in a folder; returns the file.

    The caller then makes sure that the checkpoint is still there: retention looks for pins once more after it has taken
    a checkpoint away, and puts one back that was pinned meanwhile.

    Args:
        checkpoint: The folder of the checkpoint.
        holder: The folder of the run or job that needs it; it need not exist yet.
        days: How long the pin counts.

    Raises:
        OSError: The folder of the checkpoints cannot be written.
    """
    place = holder.resolve()
    above, now = nearest_existing(place.parent), time.time()
    file = checkpoint.with_name(f"{checkpoint.name}.pin.{_mark(place)}.json")
    content = {"holder": str(place), "above": str(above), "inode": above.stat().st_ino}
    write_json(file, content | {"since": round(now, 3), "until": round(now + days * 86_400, 3)})
    file.chmod(0o644)  # the run that must obey it may be another user's, whatever the umask says
    unpin(checkpoint.parent, holder, but=file)
    return file


def unpin(checkpoints: Path, holder: Path, but: Path | None = None) -> None:
    """Removes the pins of a holder from a folder of checkpoints, except one; what cannot be removed expires."""
    for file in checkpoints.glob(f"step_*.pin.{_mark(holder.resolve())}.json"):
        if file != but:
            with contextlib.suppress(OSError):
                file.unlink()


def pins(checkpoints: Path) -> list[Pin]:
    """Returns every pin in a folder of checkpoints, dead ones too, the oldest step first."""
    found = [(match, file) for file in checkpoints.glob("step_*.pin.*.json") if (match := _NAME.fullmatch(file.name))]
    return [_read(file, checkpoints / match[1]) for match, file in sorted(found, key=lambda pair: pair[1].name)]


def _mark(place: Path) -> str:
    """Returns the holder's part of the file name: its name, and what tells it from others of that name."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", place.name)[:100]
    return f"{name}.{sha256_bytes(str(place).encode())[:8]}"


def _read(file: Path, checkpoint: Path) -> Pin:
    try:
        content = _CONTENT.validate_python(read_json(file, file.parent))
    except (PipelineError, ValidationError):
        return Pin(file, checkpoint, "", "it cannot be read")
    return Pin(file, checkpoint, printable(content["holder"]), _death(content))


def _death(content: _Content) -> str | None:
    now = time.time()
    if now >= content["until"]:
        return f"it counted until {datetime.fromtimestamp(content['until'], UTC):%Y-%m-%d}"
    if now - content["since"] > _UNBORN_S and _is_gone(Path(content["holder"]), content):
        return "the folder of its holder is gone"
    return None


def _is_gone(holder: Path, content: _Content) -> bool:
    """Whether a folder is missing, and not merely out of sight as in a container, where another folder is above it."""
    try:
        return not holder.exists() and Path(content["above"]).stat().st_ino == content["inode"]
    except (OSError, ValueError):
        return False
