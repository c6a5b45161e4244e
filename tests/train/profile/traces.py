"""Opens a trace as Perfetto does."""

from __future__ import annotations

import gzip
import json
from pathlib import Path


def spans(trace: Path) -> list[tuple[str, float, float]]:
    """Returns what was named on the main thread: name, begin and end in microseconds, by their beginnings."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    named = [e for e in events if e.get("ph") == "X" and e.get("cat") == "user_annotation"]
    return sorted(((e["name"], e["ts"], e["ts"] + e["dur"]) for e in named), key=lambda span: span[1])
