"""What is refused before anything is queued: images that no job could use, and paths that no job would see."""

from __future__ import annotations

from pathlib import Path

from pipeline.config import Config
from pipeline.errors import UsageError
from pipeline.launch.binds import check_visible
from pipeline.launch.image import check_image, image_identity, image_path
from pipeline.launch.site import Site
from pipeline.provenance import refuse_other_image
from pipeline.run import run_for


def refuse_invisible(configs: list[Config], site: Site) -> None:
    """Refuses paths of a config that a job in its container would not see.

    Raises:
        UsageError: All of them, each with its cure.
    """
    problems = [
        problem for config in _contained(configs) for problem in check_visible(config, site.container, run_for(config))
    ]
    if problems:
        raise UsageError(
            "\n  ".join(["the jobs could not see everything in their container:", *dict.fromkeys(problems)])
        )


def refuse_unfit_images(configs: list[Config], site: Site, allow_image_change: bool) -> None:
    """Refuses images that cannot be used, and those that a run was not trained in; starts each image once.

    Args:
        configs: Of all runs.
        site: The cluster; what its modules bring is judged on the nodes.
        allow_image_change: Whether a run may go on in another image.

    Raises:
        UsageError: An image is missing, damaged, of another architecture, not ours, or not the run's.
        PipelineError: An image cannot be read.
    """
    brought = bool(site.modules or site.setup)
    by_image: dict[Path, Config] = {image_path(config): config for config in _contained(configs)}
    problems = [
        problem for config in by_image.values() for problem in check_image(config, site.container, brought=brought)
    ]
    if problems:
        raise UsageError("\n  ".join([*problems, "nothing was submitted"]))
    for config in _contained(configs):
        image = image_identity(image_path(config))  # the ranks will find the sum in the cache
        if not allow_image_change:
            refuse_other_image(run_for(config).provenance(), {"path": str(image.path), "sha256": image.sha256})


def _contained(configs: list[Config]) -> list[Config]:
    return [config for config in configs if config.container.image is not None]
