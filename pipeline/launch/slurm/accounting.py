"""What Slurm's accounting knows of jobs besides their states: what they cost, and whether memory was used up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime

from pipeline.launch.slurm.client import SlurmError, call, rows, valid
from pipeline.run.attempts import Charged

_NO_VALUE = 1e18


def had_step_out_of_memory(job: str) -> bool:
    """Returns whether accounting says that a step of the job's newest allocation used up its memory."""
    try:
        states = call("sacct", "--noheader", "--parsable2", "--jobs", job, "--format", "State")
    except SlurmError:
        return False
    return "OUT_OF_MEMORY" in states.split()


def charges(ids: Iterable[str]) -> list[tuple[str, Charged]]:
    """Returns every allocation of these jobs, requeued ones too, each with the job's name; a single call of sacct.

    Raises:
        SlurmError: Accounting does not answer.
    """
    wanted = sorted(set(valid(ids)))
    if not wanted:
        return []
    fields = "JobID,Start,ElapsedRaw,AllocTRES,ConsumedEnergyRaw,JobName"
    text = call(
        "sacct", "--noheader", "--parsable2", "--allocations", "--duplicates", "--jobs", ",".join(wanted), "--format",
        fields,
    )  # fmt: skip
    return [found for row in rows(text, 6) if (found := _charged(row)) is not None]


def _charged(cells: Sequence[str]) -> tuple[str, Charged] | None:
    """Reads a line of sacct; None for a job that never ran."""
    try:
        job, start, elapsed, resources, energy, name = cells
        began = datetime.fromisoformat(start).timestamp()  # in this machine's time zone
        amounts = dict(part.split("=", 1) for part in resources.split(",") if part)
        typed = sum(int(amount) for name, amount in amounts.items() if name.startswith("gres/gpu:"))
        gpus, cpus = int(amounts.get("gres/gpu", typed)), int(amounts.get("cpu", 0))
        seconds, joules = float(elapsed), float(energy or 0)
    except ValueError:
        return None
    # Without a plugin for energy Slurm says 0, or its largest number.
    measured = joules if 0 < joules < _NO_VALUE else None
    return name, Charged(job=job, began=began, seconds=seconds, gpus=gpus, cpus=cpus, energy_j=measured)
