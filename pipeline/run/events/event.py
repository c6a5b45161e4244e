"""What an event is, and the only code that writes and parses a line of events.jsonl."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar, dataclass_transform

from pydantic import ConfigDict, TypeAdapter, ValidationError

from pipeline.run import journal

E = TypeVar("E", bound="Event")
_KINDS: dict[str, type[Event]] = {}
_END_OF_TIME = 1e11  # Unix seconds
_FORM: Any = functools.cache(TypeAdapter)


def optional() -> Any:
    """A field that is written only where it has a value."""
    return field(default=None, metadata={"optional": True})


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(field,))
@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened, as a frozen dataclass; every field has a default, so that older events can be read."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(allow_inf_nan=False)
    kind: ClassVar[str] = ""
    time: float = 0.0
    """When it was written, in Unix seconds; 0 before that."""

    def __init_subclass__(cls, kind: str = "") -> None:
        dataclass(frozen=True, kw_only=True)(cls)
        cls.kind = kind
        if kind:
            _KINDS[kind] = cls

    def fields(self) -> dict[str, Any]:
        """Returns the fields of this kind of event by name, without its time."""
        found = {f: getattr(self, f.name) for f in fields(self) if f.name != "time"}
        return {f.name: value for f, value in found.items() if value is not None or "optional" not in f.metadata}

    def record(self) -> dict[str, Any]:
        """Returns the line of the file as plain values."""
        return {"time": self.time, "event": self.kind, **self.fields()}


class UnknownEvent(Event):
    """An event of a kind that this version does not write."""

    name: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)

    def fields(self) -> dict[str, Any]:
        """Returns everything the line holds besides its time and kind."""
        return dict(self.values)


def append(path: Path, event: E) -> E:
    """Appends an event and returns it with its time; several processes (launcher, trainer, user) may write to the file.

    Raises:
        OSError: It cannot be written whole; readers ignore what is there of it.
    """
    written = event if event.time else replace(event, time=round(time.time(), 3))
    journal.append(path, written.record())
    return written


def parse(record: Mapping[str, Any]) -> Event:
    """Returns the event of one line; ignores fields that its kind does not have."""
    values = {name: value for name, value in record.items() if name not in ("time", "event")}
    given = record.get("time")
    at = float(given) if isinstance(given, (int, float)) and 0 <= given < _END_OF_TIME else 0.0
    kind = _KINDS.get(str(record.get("event")))
    if kind is not None:
        with contextlib.suppress(ValidationError):  # others may have written the file, with values of other types
            return _FORM(kind).validate_python({**values, "time": at})
    return UnknownEvent(time=at, name=str(record.get("event", "")), values=values)
