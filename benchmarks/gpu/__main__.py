"""Runs the kit: `python -m benchmarks.gpu [--minutes 8] [--device cuda|cpu] [--tiny] [--out FILE]`."""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.gpu.checks import Verdict, all_checks
from benchmarks.gpu.speed import Speed, all_speeds, as_rows
from benchmarks.harness import RESULTS, about, machine
from pipeline.run.world import World
from pipeline.train.ranks import group

T = TypeVar("T")


def main() -> int:
    """Runs all checks and measurements that fit into the time; returns 0 if nothing failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=8.0, help="measurements that would begin later are left out")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="time one tiny model instead of three real sizes")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json")
    args = parser.parse_args()
    device = torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU here; --device cpu --tiny runs the kit on a CPU")
    end, errors = time.monotonic() + 60 * args.minutes, list[str]()
    with group.process_group(World(), device):
        group.bind_device(device)
        record = _Record(args.out, device, errors)
        for verdict in _run(all_checks(device), end, errors):
            print(f"{'ok    ' if verdict.passed else 'FAILED'} {verdict.name}: {verdict.found}", flush=True)
            record.verdicts.append(verdict)
            record.write()
        for speed in _run(all_speeds(device, args.tiny), end, errors):
            print(f"{speed.size}, {speed.way}: {speed.tokens_per_s:,.0f} tokens/s", flush=True)
            record.speeds.append(speed)
            record.write()
    _table(record.speeds)
    verdicts, speeds = record.verdicts, record.speeds
    record.write()
    failed = [v.name for v in verdicts if not v.passed]
    print(f"{len(verdicts) - len(failed)} of {len(verdicts)} checks passed, {len(speeds)} measurements")
    for line in [*failed, *errors]:
        print(f"failed or not run: {line}")
    return 1 if failed or errors else 0


def _run(calls: Iterator[Callable[[], T]], end: float, errors: list[str]) -> Iterator[T]:
    """Yields the results; one that raises is noted, and so are those for which no time is left."""
    late = 0
    for call in calls:
        if time.monotonic() > end:
            late += 1
            continue
        try:
            yield call()
        except Exception as error:  # the kit says what fails on a new machine, all of it
            traceback.print_exc()
            errors.append(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    if late:
        errors.append(f"{late} for lack of time; --minutes gives more")


def _table(speeds: list[Speed]) -> None:
    table = Table("size", "way", *(("tokens/s", "MFU", "peak GiB", "planned", "step ms", "first step s")))
    for s in speeds:
        planned, mfu = (f"{v:{f}}" if v is not None else "" for v, f in ((s.planned_gib, ".2f"), (s.mfu, ".1%")))
        figures = (f"{s.tokens_per_s:,.0f}", mfu, f"{s.peak_gib:.2f}", planned, f"{1000 * s.step_s:.1f}")
        table.add_row(s.size, s.way, *figures, f"{s.first_step_s:.1f}")
    Console(width=120).print(table)


class _Record:
    """The results so far, written after each, so that an end of the allocation loses none.

    Args:
        out: The file.
        device: What was measured.
        errors: What failed.
    """

    def __init__(self, out: Path, device: torch.device, errors: list[str]) -> None:
        self.verdicts: list[Verdict] = []
        self.speeds: list[Speed] = []
        where = machine(torch.cuda.get_device_name(device)) if device.type == "cuda" else machine()
        self._out, self._errors, self._about = out, errors, about("gpu", where)

    def write(self) -> None:
        """Writes everything measured until now."""
        record: dict[str, Any] = {
            **self._about,
            "checks": [vars(verdict) for verdict in self.verdicts],
            "speeds": as_rows(self.speeds),
            "errors": self._errors,
        }
        self._out.parent.mkdir(parents=True, exist_ok=True)
        self._out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
