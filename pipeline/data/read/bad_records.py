"""What happens to a record that cannot be read: it stops the build, or is skipped and counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from pipeline.errors import DataError

INVALID_UTF8 = "invalid UTF-8"
INVALID_JSON = "invalid JSON"
MISSING_FIELD = "missing field"
NOT_A_STRING = "field is no string"
TRUNCATED = "truncated or damaged archive"
UNREADABLE = "unreadable Parquet"
TOO_LONG = "document too long"


@dataclass
class BadInput:
    """Applies the policy and counts.

    Attributes:
        policy: `error` stops at the first bad record.
        counts: Skipped records by reason.
    """

    policy: Literal["error", "skip"]
    counts: Counter[str] = field(default_factory=Counter)

    def report(self, reason: str, file: str, place: Callable[[], str], detail: str = "", records: int = 1) -> None:
        """A bad record, or several in one place.

        Args:
            reason: What is wrong.
            file: Where.
            place: Says where in the file, as `line 3, byte 120`; called only for a message.
            detail: More about what is wrong.
            records: How many.

        Raises:
            DataError: The policy is `error`.
        """
        if self.policy == "error":
            because = f" ({detail})" if detail else ""
            raise DataError(
                f"{file}, {place()}: {reason}{because}; "
                "repair the file, or set data.on_bad=skip to skip and count such records"
            )
        self.counts[reason] += records

    def take(self) -> Counter[str]:
        """The counts since the last call."""
        counts, self.counts = self.counts, Counter()
        return counts


def check_fraction(bad: Counter[str], records: int, largest: float) -> None:
    """Refuses a build with too many bad records, once it has seen everything.

    A part that was seen says nothing about the whole: 200 bad records at the start of 100,000 are 0.2 %, and what is
    seen first depends on the number of threads.

    Args:
        bad: Bad records by reason.
        records: All records, bad ones included.
        largest: `data.max_bad_fraction`.

    Raises:
        DataError: The part that is bad is above `largest`.
    """
    count = sum(bad.values())
    if count > largest * records:
        reasons = ", ".join(f"{n} x {reason}" for reason, n in sorted(bad.items()))
        raise DataError(
            f"{count} of {records} records are bad ({reasons}): {count / records:.2%} is above "
            f"data.max_bad_fraction = {largest:.2%}; repair the sources, or raise it if you know why"
        )


def check_lost(lost: int, size: int, largest: float) -> None:
    """Stops a build that could not read too much of its sources: a lost archive is one record, whatever was in it.

    Args:
        lost: Bytes of source files that could not be read or not be trusted, on the disk.
        size: Bytes of all source files.
        largest: `data.max_bad_fraction`.

    Raises:
        DataError: The part that is lost is above `largest`.
    """
    if lost > largest * size:
        raise DataError(
            f"{lost} of {size} bytes of the sources are in damaged archives or unreadable files: {lost / size:.2%} is "
            f"above data.max_bad_fraction = {largest:.2%}; repair the sources, or raise it if you know why"
        )
