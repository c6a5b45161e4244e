"""Shared by every benchmark: peers interleaved in one run, medians, dated results."""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.run.provenance import collect_provenance

RESULTS = Path(__file__).parent / "results"

# What is measured keeps its bytecode, as an installed program does; without it each process compiles the package.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def interleaved(peers: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 1) -> dict[str, float]:
    """Returns the median seconds of each peer; each round calls every peer once, so that drift affects all alike."""
    times: dict[str, list[float]] = {name: [] for name in peers}
    for turn in range(warm_up + rounds):
        for name, call in peers.items():
            began = time.perf_counter()
            call()
            if turn >= warm_up:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def machine(gpu: str = "no GPU") -> str:
    """Describes the machine, so that a reader can judge a figure."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"one virtual machine, {os.cpu_count()} cores ({_processor()}), {memory:.0f} GiB, {gpu}"


def _processor() -> str:
    """Names the processor, and what it has for products of matrices."""
    about = dict(re.findall(r"^(model name|flags)\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE))
    flags = about.get("flags", "").split()
    known = [name for name, flag in (("AVX-512", "avx512f"), ("AMX", "amx_bf16")) if flag in flags]
    return ", ".join([platform.machine(), *filter(None, [about.get("model name")]), *known])


@functools.cache
def _provenance() -> dict[str, Any]:
    """Collects provenance once, before the results of an earlier part change the working tree."""
    return collect_provenance()


def about(name: str, where: str) -> dict[str, Any]:
    """Returns what every result says of itself: the benchmark, date, commit, machine and package versions."""
    provenance = _provenance()
    return {
        "benchmark": name,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": provenance["git"],
        "machine": where,
        "packages": provenance["packages"],
    }


def refuse_arguments(doc: str | None) -> None:
    """Answers `--help`, and anything else by the usage, for a benchmark that would otherwise run for minutes."""
    argparse.ArgumentParser(description=(doc or "").partition("\n")[0]).parse_args()


def save(name: str, figures: Any, notes: str = "") -> Path:
    """Writes results with date, commit, machine and package versions to `benchmarks/results/NAME.json`."""
    record = {
        **about(name, machine()),
        "load_average_at_the_end": round(os.getloadavg()[0], 2),
        "notes": notes,
        "figures": figures,
    }
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(figures, indent=2))
    print(f"written to {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
    return path
