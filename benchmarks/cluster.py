"""Measures the time from a fault to a durable checkpoint and to the first new step, on a real Slurm.

    python -m benchmarks.cluster

Runs the cluster's survival tests, which inject the faults and take the times, and saves those. Needs root and Slurm.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.harness import save

_NOTES = (
    "Two processes on two nodes of a devcluster of five, all on this machine: start-up, mostly imports, shares its "
    "cores with a second run and the tests. A lost node includes the seconds until Slurm notices, 10 to 20 here."
)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        tests = [sys.executable, "-m", "pytest", "tests/cluster/test_survival.py", "--timeout=1800"]
        subprocess.run(tests, env={**os.environ, "CLUSTER_FIGURES": str(path)}, check=True)
        save("cluster", json.loads(path.read_text()), _NOTES)


if __name__ == "__main__":
    main()
