"""Writes an offline run of Weights & Biases; the only code that imports wandb."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

import wandb

from pipeline.errors import PipelineError
from pipeline.run.folder import Run
from pipeline.tracking import upload_state
from pipeline.tracking.convert.rows import rows
from pipeline.tracking.upload.describe import flatten


def write_run(run: Run, folder: Path) -> int:
    """Writes the folder of an offline run, which `wandb sync` uploads, and returns the number of lines of metrics.

    The id is that of the run folder, so that an upload after a later call replaces the run instead of adding another.

    Raises:
        PipelineError: wandb refuses something.
    """
    config, identity, lines = run.config(), upload_state.update(run, lambda s: None).identity, 0
    with tempfile.TemporaryDirectory(prefix=".wandb.", suffix=".tmp", dir=run.path) as temp:
        # Whatever the user's environment says: nothing is sent, and nothing of this machine is recorded.
        settings = wandb.Settings(
            mode="offline", root_dir=temp, silent=True, console="off", disable_git=True, disable_code=True,
            disable_job_creation=True, x_disable_stats=True, x_disable_meta=True,
        )  # fmt: skip
        try:
            writer = wandb.init(
                project=re.sub(r"[/\\#?%:]", "-", config.tracking.experiment)[:128],
                id=identity,
                name=run.name,
                config=dict(flatten(config.model_dump(mode="json"))),
                settings=settings,
            )
            for row in rows(run):
                lines += 1
                writer.log({**row.values, "_timestamp": row.time}, step=row.step)
            made = Path(writer.settings.sync_dir)
            writer.finish()
        except wandb.Error as error:
            raise PipelineError(f"wandb: {error}") from error
        if folder.exists():
            shutil.rmtree(folder)
        made.rename(folder)
    return lines
