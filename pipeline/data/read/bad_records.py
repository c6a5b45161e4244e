"""What happens to a record that cannot be read: it stops the build, or is skipped and counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Literal

from pipeline.errors import DataError

INVALID_UTF8 = "invalid UTF-8"
INVALID_JSON = "invalid JSON"
MISSING_FIELD = "missing field"
NOT_A_STRING = "field is no string"
NOT_COMPARABLE = "field cannot be compared"
TRUNCATED = "truncated or damaged archive"
UNREADABLE = "unreadable Parquet"
UNREADABLE_ARROW = "unreadable Arrow"
TOO_LONG = "document too long"


class BadRecordPolicy:
    """Stops at the first bad record under `error`; counts bad records by reason under `skip`."""

    def __init__(self, policy: Literal["error", "skip"]) -> None:
        self._policy = policy
        self._counts: Counter[str] = Counter()

    def report(self, reason: str, file: str, place: Callable[[], str], detail: str = "", records: int = 1) -> None:
        """Applies the policy to one bad record, or to several in one place.

        Args:
            reason: What is wrong.
            file: The file of the record.
            place: Describes where in the file, for example `line 3, byte 120`; called only for an error message.
            detail: More about what is wrong.
            records: How many records; none is nothing to report.

        Raises:
            DataError: The policy is `error`.
        """
        if not records:
            return
        if self._policy == "error":
            because = f" ({detail})" if detail else ""
            raise DataError(
                f"{file}, {place()}: {reason}{because}; "
                "repair the file, or set data.on_bad=skip to skip and count such records"
            )
        self._counts[reason] += records

    def take(self) -> Counter[str]:
        """Returns the counts since the last call."""
        counts, self._counts = self._counts, Counter()
        return counts


def check_bad_fraction(bad: Counter[str], records: int, largest: float) -> None:
    """Raises if too many of all records are bad; only for a build that has read all of them.

    The share in a part says nothing about the whole: 200 bad records at the start of 100,000 are 0.2 %, and which part
    is read first depends on the number of threads.

    Raises:
        DataError: The bad fraction is above `largest`.
    """
    count = sum(bad.values())
    reasons = ", ".join(f"{n} x {reason}" for reason, n in sorted(bad.items()))
    _check_fraction(f"{count} of {records} records are bad ({reasons})", count, records, largest)


def check_lost_fraction(lost: int, size: int, largest: float) -> None:
    """Raises if too many bytes of the sources were lost: a lost archive is one record, whatever was in it.

    Raises:
        DataError: The lost fraction is above `largest`.
    """
    what = f"{lost} of {size} bytes of the sources are in damaged archives or unreadable files"
    _check_fraction(what, lost, size, largest)


def _check_fraction(what: str, part: int, whole: int, largest: float) -> None:
    if part > largest * whole:
        raise DataError(
            f"{what}: {part / whole:.2%} is above data.max_bad_fraction = {largest:.2%}; "
            "repair the sources, or raise the limit if this much is expected"
        )
