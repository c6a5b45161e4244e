"""Measures the time from a fault to a durable checkpoint and to the first new step, on a real Slurm.

    python -m benchmarks.cluster

Runs the cluster's survival tests, which inject the faults and take the times, and saves those. Needs root and Slurm.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.harness import refuse_arguments, save

_NOTES = (
    "Two processes on two nodes of a devcluster of five, all on this machine: start-up, mostly imports, shares its "
    "cores with a second run and the tests. A lost node includes the seconds until Slurm notices, up to 31 here."
)


def main() -> None:
    refuse_arguments(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        tests = [sys.executable, "-m", "pytest", "tests/cluster/test_survival.py", "--timeout=1800"]
        subprocess.run(tests, env={**os.environ, "CLUSTER_FIGURES": str(path)}, check=True)
        save("cluster", json.loads(path.read_text()), _NOTES)


if __name__ == "__main__":
    main()
