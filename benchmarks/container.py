"""Measures what the image adds to a job's start: a SIF file and a sandbox folder against the host.

    pipeline image build && pipeline image build --sandbox
    python -m benchmarks.container

Each process starts with the command that `pipeline submit` builds, binds and process namespace included. The peers take
turns in one run. The figures are medians of the wall time of the whole process; the CPU seconds are those of all
processes that a start needs. The added time is the difference to the same command on the host.
"""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.harness import interleaved, refuse_arguments, save
from pipeline.config.load import load_config
from pipeline.image.build import apptainer_version
from pipeline.launch.container.binds import create_folders
from pipeline.launch.container.command import container_argv, container_environment
from pipeline.launch.site import SiteContainer
from pipeline.run.folder import run_for

ROOT = Path(__file__).parent.parent
IMAGES = {"sif": ROOT / "build/images/pipeline-cpu.sif", "sandbox": ROOT / "build/images/pipeline-cpu"}
COMMANDS = {
    "true": ["true"],
    "python": ["python3", "-c", "pass"],
    "torch": ["python3", "-c", "import torch"],
}
ROUNDS = 9


def main() -> None:
    refuse_arguments(__doc__)
    missing = [str(image) for image in IMAGES.values() if not image.exists()]
    if missing:
        sys.exit(f"{', '.join(missing)}: not built; run `pipeline image build`, once without and once with --sandbox")
    with tempfile.TemporaryDirectory(dir=ROOT / "build") as name, contextlib.chdir(name):
        argvs = {(what, where): _argv(where, inner) for what, inner in COMMANDS.items() for where in ("host", *IMAGES)}
        environment = container_environment(SiteContainer(), {**os.environ, "OMP_NUM_THREADS": "1"})
        peers = {" ".join(key): _start(argv, environment) for key, argv in argvs.items()}
        wall = interleaved(peers, ROUNDS)
        cpu = {name: _cpu_s(call) for name, call in peers.items()}
    figures = {
        "wall_s": {name: round(value, 3) for name, value in wall.items()},
        "cpu_s": {name: round(value, 3) for name, value in cpu.items()},
        "start_up_added_s": {i: round(wall[f"true {i}"] - wall["true host"], 3) for i in IMAGES},
        "import_of_torch_s": {
            w: round(wall[f"torch {w}"] - wall[f"python {w}"], 3) for w in ("host", *IMAGES)
        },
        "rounds": ROUNDS,
        "apptainer": apptainer_version(),
    }  # fmt: skip
    save(
        "container",
        figures,
        "Started by root: the kernel mounts the SIF. A user's squashfuse reads more slowly.",
    )


def _argv(where: str, inner: list[str]) -> list[str]:
    if where == "host":
        return [sys.executable if part == "python3" else part for part in inner]
    config = load_config(str(ROOT / "configs/demo.yaml"), [f"container.image={IMAGES[where]}", "name=start"])
    create_folders(config, run_for(config))
    return container_argv(config, SiteContainer(), run_for(config), inner, environment={}, code=None)


def _start(argv: list[str], environment: dict[str, str]) -> Callable[[], object]:
    return lambda: subprocess.run(argv, env=environment, check=True)


def _cpu_s(call: Callable[[], object]) -> float:
    """Returns the CPU seconds of a start and of all it waits for, the mean of three."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    for _ in range(3):
        call()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / 3


if __name__ == "__main__":
    main()
