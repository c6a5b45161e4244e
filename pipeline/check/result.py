"""The result of one check."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What.
        status: `failed` keeps the work from being done; a `warning` may.
        found: The figure or the fact.
        cure: What to change; empty where nothing need be.
    """

    name: str
    status: Status
    found: str
    cure: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)
