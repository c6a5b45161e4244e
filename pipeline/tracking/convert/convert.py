"""`pipeline sync RUN --to tensorboard|wandb-offline`: writes the metrics of a run as another tracker's files."""

from __future__ import annotations

import shlex
from typing import Literal

from pipeline.errors import PipelineError, UsageError
from pipeline.files import naming
from pipeline.run.folder import Run
from pipeline.tracking.convert.rows import rows

Destination = Literal["tensorboard", "wandb-offline"]


def convert(run: Run, to: Destination) -> str:
    """Writes the files of another tracker into the run folder, in place of those of an earlier call.

    They are made from the whole of metrics.jsonl each time, so steps that training repeated or took back appear once.

    Returns:
        A line for the user: what was written, and the command that shows it.

    Raises:
        UsageError: The tracker's package is not installed, or there are no metrics.
        PipelineError: The folder cannot be written.
    """
    if next(rows(run), None) is None:
        raise UsageError(f"{run.path}: nothing to convert yet: metrics.jsonl is empty")
    folder = run.tensorboard if to == "tensorboard" else run.wandb
    if folder.is_symlink():  # of a received run: it could lead anywhere
        raise PipelineError(f"{folder}: is a link, and what it leads to would be overwritten; remove it")
    try:
        if to == "tensorboard":
            from pipeline.tracking.convert.tensorboard import write_events as write
        else:
            from pipeline.tracking.convert.wandb_offline import write_run as write
    except ModuleNotFoundError as error:
        package = to.removesuffix("-offline")
        raise UsageError(f"{package} is not installed here; pip install {package}, and repeat the command") from error
    with naming(folder, "cannot be written"):
        lines = write(run, folder)
    show = ["tensorboard", "--logdir", run.path.parent] if to == "tensorboard" else ["wandb", "sync", folder]
    return f"{folder}: {lines:,} lines of metrics; to show them: {shlex.join(map(str, show))}"
