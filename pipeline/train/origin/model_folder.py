"""A run that starts from a model folder in Hugging Face's format."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from pipeline.config.sections import Config
from pipeline.errors import UsageError
from pipeline.huggingface.open_weights import OpenWeights
from pipeline.run.folder import run_for
from pipeline.run.world import World
from pipeline.train.engine.engine import Engine
from pipeline.train.engine.fresh import INIT_VERSION
from pipeline.train.ranks import group

# To read a file of weights once, and check its values, on a slow disk.
CHECK_TIMEOUT = timedelta(hours=1)


@dataclass(frozen=True)
class ModelFolder:
    """Weights that a run starts from, checked."""

    weights: OpenWeights
    record: dict[str, str]
    """Where they come from and the digest of the folder: for the checkpoints and the provenance."""

    def fill(self, engine: Engine) -> dict[str, Any]:
        """Takes the weights; the moments stay zero."""
        engine.take(self.weights)
        self.weights.close()
        return {"initialization": INIT_VERSION, "init": self.record}

    def lines(self) -> list[str]:
        """Returns what the user is told at the start."""
        return [f"starting from {self.record['from']} (digest {self.record['digest'][:12]})"]


def found_model_folder(config: Config, tokenizer_digest: str, world: World) -> ModelFolder:
    """Returns the weights of the folder, the ranks sharing the check of its files.

    Args:
        config: The experiment, whose `init` names the folder.
        tokenizer_digest: Digest of the tokenizer that the data was prepared with.
        world: This process's place.

    Raises:
        UsageError: The folder is not what the config and the data expect, or not what the run started from before.
    """
    folder = config.init.folder
    assert folder is not None
    weights = OpenWeights(folder, config.model)
    weights.refuse_other_tokenizer(config.data.path, tokenizer_digest)
    problem, checked = None, {}
    try:
        checked = {file.name: weights.check_values(file) for file in weights.files[world.rank :: world.size]}
    except UsageError as error:
        problem = str(error)
    found = group.gather((problem, checked), world, CHECK_TIMEOUT)
    for other, _ in found:
        if other is not None:
            raise UsageError(other)
    digest = weights.digest({name: sha256 for _, part in found for name, sha256 in part.items()})
    before = run_for(config).origin()
    if before is not None and before["digest"] != digest:
        raise UsageError(
            f"{folder}: has changed since this run started from it (digest {before['digest'][:12]}, now "
            f"{digest[:12]}); restore it, or give the new experiment another `name`"
        )
    return ModelFolder(weights, {"from": f"hf:{folder}", "digest": digest})
