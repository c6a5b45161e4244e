"""`pipeline check`: finds what would make a run fail here, or at a site, before it is submitted. Imports no torch."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pipeline
from pipeline.check.data import check_data, check_dataset
from pipeline.check.memory import check_memory, check_zero_stage
from pipeline.check.node import NO_GPU
from pipeline.check.notify import check_notify
from pipeline.check.result import Check
from pipeline.checkpoint.layout import published
from pipeline.config.load import load_config
from pipeline.config.sections import Config
from pipeline.data.layout import MANIFEST
from pipeline.data.manifest import DatasetManifest
from pipeline.data.shard_maps import open_files_for
from pipeline.errors import PipelineError, UsageError
from pipeline.files import nearest_existing
from pipeline.launch.container.binds import check_visible, temporary_folders
from pipeline.launch.container.command import container_argv, container_environment
from pipeline.launch.container.image import check_image, runtime_problem
from pipeline.launch.site import Site, SiteContainer, load_site
from pipeline.plan.devices import DEVICES, device_reported
from pipeline.plan.memory import checkpoint_bytes
from pipeline.run.folder import Run, run_for
from pipeline.text_format import gigabytes
from pipeline.train.origin.parent import Parent, checkpoints_of, choose

_NODE_TIMEOUT_S = 300
# Checks of a node that depend on the packages of its Python; `node` fails where that Python does not even start.
_PACKAGE_CHECKS = ("torch", "deepspeed", "devices", "node")
_ENVIRONMENT = {"OMP_NUM_THREADS": "1"}


def run_checks(
    config_file: str, site_file: str | None, overrides: Sequence[str], sweeps: Sequence[str] = ()
) -> list[Check]:
    """Runs every check of a config, for this machine or for a site.

    Raises:
        ConfigError: Everything that is wrong with the config or the site file.
    """
    site = load_site(site_file) if site_file else None
    world = site.train.nodes * site.train.tasks_per_node if site else 1
    config = load_config(config_file, overrides, world_size=world)
    run = run_for(config)
    found = [Check("config", "ok", f"valid for {world} process{'es' if world > 1 else ''}")]
    found += [
        check_memory(config, site),
        *check_zero_stage(config, site),
        _disk(config),
        *check_data(config),
        *_parent(config),
    ]
    container = site.container if site else SiteContainer()
    from_job = site is not None and bool(site.modules or site.setup)
    if site is not None and site_file is not None:
        from pipeline.check.site_request import check_site_request
        from pipeline.check.submission import check_submission
        from pipeline.launch.submit.sweep import experiments

        runs = len(experiments(config_file, overrides, sweeps, world).configs)
        found += [*check_site_request(site, run, runs), check_notify(run)]
        found += _container(config, container, run, from_job)
        found += check_submission(config_file, site_file, overrides, sweeps, known=found)
    else:
        found += _container(config, container, run, from_job)
    if config.container.image is None:
        found += _node(config, site, from_job)
    else:
        found += _of_the_site(_node_in_image(config, container, run), site)
    return found + _precision(config, site, found)


def quick_checks(config: Config, site: Site) -> list[Check]:
    """Runs the checks that need no other program: memory, disk, data, and the run that this one branches from."""
    return [check_memory(config, site), _disk(config), check_dataset(config), *_parent(config)]


def _precision(config: Config, site: Site | None, found: Sequence[Check]) -> list[Check]:
    """Warns of a precision that the GPU does not have, by the site's `gpu_type` or by what this machine reports."""
    if config.train.device == "cpu":
        return []
    device = None
    if site is None:
        reported = next((check.found for check in found if check.name == "devices" and check.status == "ok"), "")
        device = device_reported(reported)
    elif site.train.gpus_per_node and site.gpu_type is not None:
        device = DEVICES.get(site.gpu_type.lower())
    lacking = device.lacks(config.train.precision) if device is not None else None
    return [Check("precision", "warning", lacking, "train.precision=fp32")] if lacking else []


def _disk(config: Config) -> Check:
    keep, train = config.checkpoint, config.train
    # The oldest is deleted only after the newest is written.
    kept = keep.keep_last + 1 + keep.keep_best + (train.max_iters // keep.keep_every if keep.keep_every else 0)
    kept = min(kept, -(-train.max_iters // train.checkpoint_interval) + 1)
    there = len(published(run_for(config).checkpoints))
    needed = max(1, kept - there) * checkpoint_bytes(config)
    place = nearest_existing(Path(config.runs_dir))
    free = shutil.disk_usage(place).free
    found = (
        f"{max(1, kept - there)} more checkpoints take {gigabytes(needed, 2)}, {gigabytes(free)} are free at {place}"
    )
    if needed <= free:
        return Check("disk", "ok", found)
    return Check("disk", "failed", found, "make room, choose another runs_dir, or keep fewer checkpoints")


def _parent(config: Config) -> list[Check]:
    """Checks what the run would branch from; says nothing of any other run."""
    run, data = run_for(config), Path(config.data.path)
    if checkpoints_of(config.init) is None or published(run.checkpoints):
        return []
    try:
        before = run.origin()
        parent = Parent.open(choose(config.init, before))
        parent.refuse(config, DatasetManifest.load(data) if (data / MANIFEST).exists() else None, before)
    except UsageError as error:
        return [Check("parent", "failed", str(error), "docs/start-from.md tells what may differ")]
    except PipelineError:
        return []  # `check_data` names what is wrong with the data
    return [Check("parent", "ok", f"{config.init.what} of step {parent.manifest.step} of {parent.folder}")]


def _container(config: Config, site: SiteContainer, run: Run, from_job: bool) -> list[Check]:
    if config.container.image is None:
        return [Check("container", "ok", "none: jobs use the environment they find")]
    missing = runtime_problem(site)
    if missing is not None and not from_job:
        return [Check("container", "failed", missing, "install apptainer, or correct container.command of the site")]
    problems = check_visible(config, site, run) + check_image(config, site, from_job=from_job)
    if not problems and missing is not None:
        return [Check("container", "warning", missing, "the modules of the jobs are expected to provide it")]
    if not problems:
        return [Check("container", "ok", f"{config.container.image} starts, and all paths can be seen in it")]
    return [Check("container", "failed", problem, "see docs/container.md") for problem in problems]


def _node(config: Config, site: Site | None, from_job: bool) -> list[Check]:
    """Runs the checks that import torch with the Python that a job starts."""
    python = (site.python if site else None) or sys.executable
    code = str(Path(pipeline.__file__).parent.parent)
    path = os.pathsep.join(filter(None, (code, os.environ.get("PYTHONPATH"))))
    found = _run_node([python, *_node_command(config)], {**os.environ, **_ENVIRONMENT, "PYTHONPATH": path})
    if site is None:
        return found
    judged = [
        _for_a_job(one, from_job) if one.status == "failed" and one.name in _PACKAGE_CHECKS else one for one in found
    ]
    return _of_the_site(judged, site)


def _of_the_site(found: list[Check], site: Site | None) -> list[Check]:
    """Turns `no GPU`, which is right on a login node, into a warning where the jobs request GPUs."""
    if site is None or not site.train.gpus_per_node:
        return found
    warning = Check(
        "devices",
        "warning",
        "no GPU on this machine: driver and devices of the nodes are not compared",
        "every start checks its devices before the first step; to look now, run this command in a job with a GPU",
    )
    return [warning if one.name == "devices" and one.found.startswith(NO_GPU) else one for one in found]


def _for_a_job(missing: Check, from_job: bool) -> Check:
    """Returns the result for a package that is missing here: a job's modules or setup may provide it."""
    if from_job:
        return replace(missing, status="warning", cure="the modules or setup of the jobs are expected to provide it")
    cure = "name a Python that has it as `python` of the site file, or a container.image"
    return replace(missing, cure=f"{missing.cure}; or {cure}")


def _node_in_image(config: Config, site: SiteContainer, run: Run) -> list[Check]:
    """Runs the checks that import torch inside the image."""
    if runtime_problem(site) is not None:
        return []  # `_container` has reported it
    code = Path(pipeline.__file__).parent.parent
    inner, environment = _node_command(config), _ENVIRONMENT
    try:
        with temporary_folders(config, run):
            command = container_argv(config, site, run, ["python3", *inner], environment=environment, code=code)
            return _run_node(command, container_environment(site, {**os.environ, **environment}))
    except PipelineError:
        return []  # `_container` has reported it


def _node_command(config: Config) -> list[str]:
    """Returns what follows `python` on the command line of `pipeline.check.node`."""
    shards = 0
    with contextlib.suppress(PipelineError):  # `check_data` has reported it
        shards = len(DatasetManifest.load(config.data.path).shards)
    folders = [str(config.runs_dir), str(Path(config.data.path).parent)]
    tasks = [f"--evaluate={config.evaluate.model_dump_json()}"] if config.evaluate.tasks else []
    return ["-m", "pipeline.check.node", *folders, f"--open-files={open_files_for(shards)}", *tasks]


def _run_node(command: Sequence[str], environment: Mapping[str, str]) -> list[Check]:
    """Runs `pipeline.check.node` and returns its results; a process that fails is one failed check."""
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, errors="replace", timeout=_NODE_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return [Check("node", "failed", f"no answer in {_NODE_TIMEOUT_S} s", "look at the node's file systems")]
    except OSError as error:
        return [Check("node", "failed", f"{command[0]}: {error.strerror}", "see docs/container.md")]
    try:
        return [Check(**fields) for fields in json.loads(done.stdout)]
    except ValueError:
        said = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        return [Check("node", "failed", said[0], f"run it by hand: {shlex.join(command)}")]
