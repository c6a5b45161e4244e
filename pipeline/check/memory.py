"""What `pipeline check` says about memory: does a process fit where it will run?"""

from __future__ import annotations

import os

from pipeline.check.result import Check
from pipeline.config.sections import Config
from pipeline.errors import PipelineError
from pipeline.launch.container.command import gpu_option
from pipeline.launch.site import Site
from pipeline.plan.devices import GIB, device_named
from pipeline.plan.memory import process_memory
from pipeline.plan.plan import fits_device, needed_bytes


def check_memory(config: Config, site: Site | None) -> Check:
    """Compares the peak of a process with the memory of its device, of the job, or of this machine."""
    world = site.train.nodes * site.train.tasks_per_node if site else 1
    has_gpu = bool(site.train.gpus_per_node) if site else gpu_option("auto") is not None
    on_cpu = config.train.device == "cpu" or not has_gpu
    memory = process_memory(config, world, on_cpu=on_cpu)
    needs = f"{needed_bytes(memory) / GIB:.2f} GiB per process at its peak ({memory.moment})"
    unknown = _unknown(site, on_cpu)
    if unknown is not None:
        found, cure = unknown
        return Check("memory", "warning", f"{needs}, compared with nothing: {found}", cure)
    limit, of = _limit(site, on_cpu)
    if fits_device(memory, limit):
        return Check("memory", "ok", f"{needs}, of {limit:.1f} GiB {of}")
    cure = "raise train.zero_stage, set train.activation_checkpointing=full, or lower train.micro_batch_size"
    return Check("memory", "failed", f"{needs}, and there are {limit:.1f} GiB {of}", cure)


def check_zero_stage(config: Config, site: Site | None) -> list[Check]:
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


def _unknown(site: Site | None, on_cpu: bool) -> tuple[str, str] | None:
    """Returns why there is nothing to compare with, and the cure; None where there is."""
    if site is None:
        return None if on_cpu else ("the memory of this machine's GPU is not read", "look at `nvidia-smi`")
    if on_cpu:
        cure = "set train.mem_gb of the site"
        return ("the site sets no train.mem_gb", cure) if site.train.mem_gb is None else None
    if site.gpu_type is None:
        return "the site names no gpu_type", "set gpu_type of the site, for example h100"
    try:
        device_named(site.gpu_type)
    except PipelineError:
        return (
            f"the memory of a {site.gpu_type} is unknown",
            "look it up; `pipeline plan --device` lists the known ones",
        )
    return None


def _limit(site: Site | None, on_cpu: bool) -> tuple[float, str]:
    """Returns the GiB that a process may use, and whose they are."""
    if site is None:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, "of this machine"
    if on_cpu:
        return (site.train.mem_gb or 0.0) / site.train.tasks_per_node, "by train.mem_gb of the site"
    return device_named(site.gpu_type or "").memory_gib, f"of a {site.gpu_type}"
