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
from pipeline.check.result import Check
from pipeline.checkpoint.layout import published
from pipeline.config.load import load_config
from pipeline.config.sections import Config
from pipeline.data.layout import MANIFEST
from pipeline.data.manifest import DatasetManifest, check_sizes
from pipeline.data.read.sources import find_files
from pipeline.data.shard_maps import open_files_for
from pipeline.errors import PipelineError
from pipeline.files import nearest_existing
from pipeline.launch.container.binds import check_visible, temporary_folders
from pipeline.launch.container.command import container_argv, container_environment, gpu_option
from pipeline.launch.container.image import check_image, runtime_problem
from pipeline.launch.site import Site, SiteContainer, load_site
from pipeline.plan.devices import GIB, device_named
from pipeline.plan.memory import checkpoint_bytes, process_memory
from pipeline.plan.plan import fits_device, needed_bytes
from pipeline.run.folder import Run, run_for
from pipeline.text_format import gigabytes, megabytes

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
    found += [_memory(config, site), *_zero_stage(config, site), _disk(config), _data(config)]
    if site is not None:
        from pipeline.check.site_request import check_site_request
        from pipeline.launch.submit.sweep import experiments

        runs = len(experiments(config_file, overrides, sweeps, world))
        found += check_site_request(site, run, runs)
    container = site.container if site else SiteContainer()
    from_job = site is not None and bool(site.modules or site.setup)
    found += _container(config, container, run, from_job)
    if config.container.image is None:
        return found + _node(config, site, from_job)
    return found + _node_in_image(config, container, run)


def _memory(config: Config, site: Site | None) -> Check:
    world = site.train.nodes * site.train.tasks_per_node if site else 1
    has_gpu = bool(site.train.gpus_per_node) if site else gpu_option("auto") is not None
    on_cpu = config.train.device == "cpu" or not has_gpu
    memory = process_memory(config, world, on_cpu=on_cpu)
    needs = f"{needed_bytes(memory) / GIB:.2f} GiB per process at its peak ({memory.moment})"
    limit, of = _memory_limit(site, on_cpu)
    if limit is None:
        return Check("memory", "ok", f"{needs}; {of}")
    if fits_device(memory, limit):
        return Check("memory", "ok", f"{needs}, of {limit:.1f} GiB {of}")
    cure = "raise train.zero_stage, set train.activation_checkpointing=full, or lower train.micro_batch_size"
    return Check("memory", "failed", f"{needs}, and there are {limit:.1f} GiB {of}", cure)


def _zero_stage(config: Config, site: Site | None) -> list[Check]:
    """Warns of stage 0 on several GPUs; says nothing elsewhere."""
    gpus = site.train.nodes * site.train.tasks_per_node if site and site.train.gpus_per_node else 1
    if gpus == 1 or config.train.device == "cpu" or config.train.zero_stage > 0:
        return []
    found = (
        f"stage 0 on {gpus} GPUs: they wait while all gradients are averaged after backward, and each keeps all state"
    )
    return [
        Check("zero stage", "warning", found, "train.zero_stage=1 or 2 with train.overlap_comm=true; docs/scaling.md")
    ]


def _memory_limit(site: Site | None, on_cpu: bool) -> tuple[float | None, str]:
    """Returns the GiB that a process may use, and whose they are; None where that is unknown."""
    if site is None and on_cpu:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, "of this machine"
    if site is None:
        return None, "compare it with the memory of this machine's GPU"
    if on_cpu:
        if site.train.mem_gb is None:
            return None, "the site sets no train.mem_gb to compare it with"
        return site.train.mem_gb / site.train.tasks_per_node, "by train.mem_gb of the site"
    if site.gpu_type is None:
        return None, "the site names no gpu_type to compare it with"
    try:
        return device_named(site.gpu_type).memory_gib, f"of a {site.gpu_type}"
    except PipelineError:
        return None, f"the memory of a {site.gpu_type} is unknown"


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


def _data(config: Config) -> Check:
    folder = Path(config.data.path)
    if not (folder / MANIFEST).exists():
        try:
            files = [file for source in config.data.sources for file in find_files(source)]
        except PipelineError as error:
            return Check("data", "failed", str(error), "correct data.sources")
        size = sum(Path(file.path).stat().st_size for file in files)
        found = f"to be prepared from {len(files):,} files, {megabytes(size)}"
        place = nearest_existing(folder)
        free = shutil.disk_usage(place).free
        if free < size:  # tokens usually take half of plain text, and more than compressed text
            return Check(
                "data", "warning", f"{found}; {megabytes(free)} are free at {place}", "make room for the tokens"
            )
        return Check("data", "ok", found)
    try:
        manifest = DatasetManifest.load(folder)
        check_sizes(folder, manifest.shards, manifest.numpy_dtype)
    except PipelineError as error:
        return Check("data", "failed", str(error), f"`pipeline verify {folder}` names every damaged file")
    return Check("data", "ok", f"{manifest.splits['train'].tokens:,} training tokens, sizes agree with the manifest")


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
    return [
        _for_a_job(one, from_job) if one.status == "failed" and one.name in _PACKAGE_CHECKS else one for one in found
    ]


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
    with contextlib.suppress(PipelineError):  # `_data` has reported it
        shards = len(DatasetManifest.load(config.data.path).shards)
    folders = [str(config.runs_dir), str(Path(config.data.path).parent)]
    return ["-m", "pipeline.check.node", *folders, f"--open-files={open_files_for(shards)}"]


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
