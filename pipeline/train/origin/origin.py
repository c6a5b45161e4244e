"""The origin of a new run: weights from elsewhere, and the state to begin with."""

from __future__ import annotations

import contextlib
from typing import Any, Protocol

from pipeline.config.sections import Config
from pipeline.data.manifest import DatasetManifest
from pipeline.run.world import World
from pipeline.train.engine.engine import Engine
from pipeline.train.origin.branch import found_branch
from pipeline.train.origin.model_folder import found_model_folder


class Origin(Protocol):
    """Something that a run can start from, checked."""

    def fill(self, engine: Engine) -> dict[str, Any]:
        """Fills the engine; returns the state of a run that begins so, as a checkpoint would hold it, and its step."""

    def lines(self) -> list[str]:
        """Returns what the user is told at the start."""


def found_origin(
    config: Config, dataset: DatasetManifest, world: World
) -> contextlib.AbstractContextManager[Origin | None]:
    """Finds and checks what the section `init` names, the ranks sharing the work; None if it is empty.

    The run folder is created inside the block: if that fails, nothing is left of the search.

    Args:
        config: The experiment.
        dataset: The data that it trains on.
        world: This process's place.

    Raises:
        UsageError: It is not what the config and the data expect, or not what the run started from before.
    """
    if config.init.folder is None:
        return contextlib.nullcontext()
    if config.init.is_model_folder:
        return contextlib.nullcontext(found_model_folder(config, dataset.tokenizer_digest, world))
    return found_branch(config, dataset, world)
