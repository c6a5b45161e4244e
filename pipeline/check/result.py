"""The result of one check."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Check:
    """The result of one check."""

    name: str
    """What was checked."""
    status: Status
    """`failed` means that the work cannot run; `warning`, that it may not."""
    found: str
    """The value or the fact that decided."""
    cure: str = ""
    """What to change; empty where nothing has to be."""

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as plain JSON values."""
        return asdict(self)
