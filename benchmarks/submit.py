"""Measures how long `pipeline submit` and its dry run take, against a real Slurm.

    python -m benchmarks.submit

Needs root and Slurm. Each call submits the three jobs of the demo on hold, so that nothing computes meanwhile.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import refuse_arguments, save
from pipeline.devcluster import cluster as devcluster
from pipeline.devcluster.hosts import environment

_ROOT = Path(__file__).parents[1]
_ROUNDS = 10
_NOTES = (
    "Median and longest of 10, interleaved; wall seconds from the start of the process to its end. The machine was "
    "busy with other work, so this ran at real-time priority: chrt -r 1 python -m benchmarks.submit"
)


def main() -> None:
    refuse_arguments(__doc__)
    (_ROOT / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_ROOT / "build", prefix="submit-") as name:
        folder = Path(name)
        site = folder / "site.yaml"
        site.write_text((_ROOT / "slurm/sites/devcluster.yaml").read_text() + "\nextra_sbatch: {hold: true}\n")
        settings = devcluster.up(folder / "state", 3)
        env = {**os.environ, **environment(settings), "PYTHONPATH": str(_ROOT)}
        try:
            found = _measure(folder, site, env)
        finally:
            devcluster.down(folder / "state")
    figures = {
        what: {
            "wall_s_median": round(statistics.median(wall for wall, _ in times), 3),
            "wall_s_longest": round(max(wall for wall, _ in times), 3),
            "cpu_s_median": round(statistics.median(cpu for _, cpu in times), 3),
        }
        for what, times in found.items()
    }
    save("submit", figures, _NOTES)


def _measure(folder: Path, site: Path, env: dict[str, str]) -> dict[str, list[tuple[float, float]]]:
    """Returns wall and CPU seconds of every call; the first round only warms the caches."""
    found: dict[str, list[tuple[float, float]]] = {"submit": [], "submit --dry-run": []}
    for turn in range(_ROUNDS + 1):
        for what, options in (("submit --dry-run", ["--dry-run"]), ("submit", [])):
            settings = [f"name=demo-{turn}", f"runs_dir={folder}/runs", f"data.path={folder}/tokens"]
            command = ["submit", str(_ROOT / "configs/demo.yaml"), "--site", str(site), *options, *settings]
            taken = _timed([sys.executable, "-m", "pipeline", *command], env)
            if turn > 0:
                found[what].append(taken)
    return found


def _timed(command: list[str], env: dict[str, str]) -> tuple[float, float]:
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, cwd=_ROOT, env=env, check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
