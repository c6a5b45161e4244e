"""Refusals before anything is queued: runs that are already in the queue, images and paths that no job could use."""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline.config.sections import Config
from pipeline.errors import UsageError, listing
from pipeline.launch.container.binds import check_visible
from pipeline.launch.container.image import check_image, image_identity, image_path
from pipeline.launch.site import Site
from pipeline.launch.slurm import client as slurm
from pipeline.launch.slurm import job_records
from pipeline.run.folder import Run, run_for
from pipeline.run.provenance import refuse_other_image
from pipeline.text_format import hidden_character

_UNFIT = {
    # submitit expands it too, in its own way, and only when the job is in the queue.
    "%": "which Slurm reads as a variable (%j, the job's id)",
    "\\": "which Slurm takes as an escape, so that the jobs could not write their logs",
    ":": "at which Python divides the path of the submitted code",
}


def refuse_unfit_folder(home: Run) -> None:
    """Refuses a folder for the files of the jobs whose name Slurm, a shell or Python would not take as a name.

    Raises:
        UsageError: Its name contains a control character, a percent sign, a colon or a backslash.
    """
    folder = home.launch.absolute()
    for path in (str(folder), sys.executable):
        hidden = hidden_character(path)
        if hidden is not None:
            # A line break would become a line of the batch script.
            raise UsageError(
                f"{path!r}: has the control character {hidden} in its name, which a batch script must not hold; "
                "rename the folder"
            )
    for character, why in _UNFIT.items():
        if character in str(folder):
            raise UsageError(
                f"runs_dir: {folder} has a {character} in its name, {why}; "
                "choose another runs_dir, or rename the folder"
            )


def refuse_active(runs: list[Run], home: Run) -> None:
    """Refuses runs that are already in the queue: two jobs would train one run, or read each other's work.

    `home` remembers the jobs of a sweep, whose run folders may be gone.

    Raises:
        UsageError: One of their jobs waits or runs.
        SlurmError: Slurm does not answer.
    """
    known = [(folder, job) for folder in (*runs, home) for job in job_records.jobs(folder)]
    queue = slurm.names_in_queue(job.id for _, job in known)
    for folder, job in known:
        if not any(slurm.base(task) == slurm.base(job.id) and job.is_named(name) for task, name in queue.items()):
            continue
        where, out = (
            (f"pipeline status {folder.path}", f"pipeline cancel {folder.path}")
            if folder in runs
            else (f"squeue --jobs {job.id}", f"scancel {job.id}")
        )
        raise UsageError(
            f"{folder.path}: is already in the queue as job {job.id}; wait for it (`{where}`) "
            f"or cancel it first (`{out}`)"
        )


def refuse_invisible(configs: list[Config], site: Site) -> None:
    """Refuses paths of a config that a job in its container would not see.

    Raises:
        UsageError: Lists all of them, each with its cure.
    """
    problems = [
        problem for config in _contained(configs) for problem in check_visible(config, site.container, run_for(config))
    ]
    if problems:
        raise UsageError(listing("the jobs could not see everything in their container:", dict.fromkeys(problems)))


def refuse_unfit_images(configs: list[Config], site: Site, allow_image_change: bool) -> None:
    """Refuses images that cannot be used, and images that a run was not trained in; starts each image once.

    Raises:
        UsageError: An image is missing, damaged, of another architecture, not ours, or not the run's.
        PipelineError: An image cannot be read.
    """
    from_job = bool(site.modules or site.setup)  # what these provide is checked on the nodes
    by_image: dict[Path, Config] = {image_path(config): config for config in _contained(configs)}
    problems = [
        problem for config in by_image.values() for problem in check_image(config, site.container, from_job=from_job)
    ]
    if problems:
        raise UsageError("\n  ".join([*problems, "nothing was submitted"]))
    if not allow_image_change:
        refuse_changed_images(configs)


def refuse_changed_images(configs: list[Config]) -> None:
    """Refuses images that a run was not trained in.

    Raises:
        UsageError: An image differs.
    """
    for config in _contained(configs):
        image = image_identity(image_path(config))  # the ranks will find the checksum in the cache
        refuse_other_image(run_for(config).provenance(), {"path": str(image.path), "sha256": image.sha256})


def _contained(configs: list[Config]) -> list[Config]:
    return [config for config in configs if config.container.image is not None]
