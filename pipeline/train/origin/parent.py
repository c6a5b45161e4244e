"""The checkpoint that a run branches from: which one, whether the config fits it, and where the config differs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from pipeline.checkpoint.layout import Manifest, published, step_of
from pipeline.config.init_section import InitConfig
from pipeline.config.messages.values import first_problem
from pipeline.config.model_section import ModelConfig
from pipeline.config.section_base import cut
from pipeline.config.sections import Config
from pipeline.data.manifest import DatasetManifest
from pipeline.errors import CheckpointError, UsageError, listing
from pipeline.files import is_regular, naming, sha256_file
from pipeline.run.folder import CHECKPOINT_MANIFEST, Run, open_run, step_name
from pipeline.run.records import Origin, lineage
from pipeline.tracking.upload.describe import flatten

# They give the weights their shapes and meaning; norm_eps, the position embedding and the context may change.
_SHAPE = (
    "vocab_size", "d_model", "num_layers", "num_heads", "num_kv_heads", "head_dim", "d_ff", "tie_embeddings",
    "qkv_bias", "qk_norm",
)  # fmt: skip
# What training depends on; the rest is about where and how often.
_COMPARED = {"data", "tokenizer", "model", "optimizer", "train", "guard", "deepspeed"}
# Together with the dataset they decide which samples make up a batch.
_ORDER = (
    "data.order", "data.mixing", "data.packing", "data.phases", "data.sources", "train.seed", "train.batch_size",
    "model.context_length",
)  # fmt: skip
# What a parent of an earlier version trained with, which has no such key.
_BEFORE = {"data.packing": '"concat"', "data.phases": "[]"}


def checkpoints_of(init: InitConfig) -> Path | None:
    """Returns the folder of checkpoints that `init` takes one from; None if it names no run or checkpoint."""
    folder = init.folder
    if folder is None or init.is_model_folder:
        return None
    return folder.absolute().parent if is_regular(folder / CHECKPOINT_MANIFEST) else Run(folder).checkpoints


def choose(init: InitConfig, before: Origin | None) -> Path:
    """Returns the checkpoint that `init` names, or the one that the run started from before.

    Raises:
        UsageError: There is none.
    """
    folder = init.folder
    assert folder is not None
    if is_regular(folder / CHECKPOINT_MANIFEST):
        if init.step is not None:
            raise UsageError(f"init.step: given {init.step}, and init.from is a checkpoint already: {folder}")
        return folder.absolute()
    with naming(f"init.from: {folder}", "cannot be read", error=UsageError):
        if not folder.is_dir():
            raise UsageError(f"init.from: {folder} is no folder; it names that of a run, of a checkpoint, or hf:FOLDER")
        checkpoints = open_run(folder).checkpoints
    there = published(checkpoints)
    if not there:
        raise UsageError(f"init.from: {checkpoints} holds no checkpoint; train that run first")
    step = init.step if before is None else before.get("step")
    chosen = there[0] if step is None else checkpoints / step_name(step)
    if chosen not in there:
        known = ", ".join(str(step_of(path)) for path in there[:20])
        cure = (
            f"init.step: allowed: {known}"
            if before is None
            else "this run started from it and has no checkpoint of its own: give the new experiment another `name`"
        )
        raise UsageError(f"{chosen}: is not there; {cure}")
    return chosen.absolute()


@dataclass(frozen=True)
class Parent:
    """A checkpoint that a run branches from."""

    folder: Path
    manifest: Manifest
    digest: str
    """Names its content."""
    settings: dict[str, str]
    """The parent's config, as the checkpoint holds it: JSON by dotted keys."""

    @classmethod
    def open(cls, folder: Path) -> Parent:
        """Reads the manifest, which may come from anyone.

        Raises:
            UsageError: It is damaged, or training did not write it.
        """
        try:
            manifest, digest = Manifest.load_named(folder)
        except CheckpointError as error:
            raise UsageError(f"init.from: {error}") from error
        try:
            settings = _settings(manifest.state["config"])
        except KeyError:
            raise UsageError(f"init.from: {folder}: holds no config; no training of this program wrote it") from None
        except RecursionError:
            raise UsageError(f"init.from: {folder}: holds a config that is nested too deeply") from None
        return cls(folder, manifest, digest, settings)

    @property
    def run(self) -> Run | None:
        """The run that it belongs to; None if it was copied out of it."""
        run = Run(self.folder.parent.parent)
        return run if self.folder.parent == run.checkpoints and run.config_file.is_file() else None

    def refuse(self, config: Config, data: DatasetManifest | None, before: Origin | None) -> None:
        """Refuses a config that cannot continue from this checkpoint.

        Args:
            config: The config of the branch.
            data: The data that it trains on; None if that is not prepared yet.
            before: What the branch started from before, if it did.

        Raises:
            UsageError: Names everything that does not fit.
        """
        problems = self._problems_of_shape(config.model)
        if data is not None:
            problems += self._problems_of_tokenizer(data.tokenizer_digest)
        step, until = self.manifest.step, config.train.max_iters
        if config.init.what == "all" and until <= step:
            problems.append(f"train.max_iters: {until}, and the branch begins after step {step}; it counts from 0")
        if config.init.what == "all" and "optimizer_steps" not in self.manifest.state:
            problems.append("init.what: all, and this checkpoint holds no moments that training wrote")
        if before is not None and before["digest"] != self.digest:
            problems.append(
                f"has changed since this run started from it (digest {before['digest'][:12]}, now {self.digest[:12]})"
            )
        if problems:
            cure = "Change the config, or name another checkpoint."
            raise UsageError(listing(f"{self.folder}: this config cannot start from it:", problems, cure))

    def _problems_of_shape(self, model: ModelConfig) -> list[str]:
        try:
            found = ModelConfig.model_validate(self.manifest.state["config"].get("model"))
        except ValidationError as error:
            return [f"model: cannot be read in the checkpoint ({first_problem(error)})"]
        theirs, ours = ({**m.model_dump(), "num_kv_heads": m.kv_heads, "head_dim": m.head_size} for m in (found, model))
        return [
            f"model.{key}: {theirs[key]!r} in the checkpoint, {ours[key]!r} in the config"
            for key in _SHAPE
            if theirs[key] != ours[key]
        ]

    def _problems_of_tokenizer(self, digest: str) -> list[str]:
        found, run = self.manifest.state.get("tokenizer"), self.run
        if found is None and run is not None and is_regular(run.tokenizer_file, run.path):
            found = sha256_file(run.tokenizer_file, run.path)  # checkpoints of earlier versions do not hold it
        if found in (None, digest):
            return []
        return [f"data.path: was made with the tokenizer {digest[:12]}, the checkpoint's is {str(found)[:12]}"]

    def differences(self, config: Config, data: DatasetManifest) -> list[str]:
        """Returns where the config and the data differ from the parent's, one line each."""
        found = [
            f"{key}: {cut(self.settings[key], 100)} in the parent, {cut(value, 100)} here"
            for key, value in _settings(config.model_dump(mode="json", include=_COMPARED)).items()
            if self.settings.get(key, value) != value
        ]
        trained_on = self.manifest.state.get("dataset")
        if trained_on != data.digest:
            found.append(f"dataset: {str(trained_on)[:12]} in the parent, {data.digest[:12]} here")
        return found

    def has_order_of(self, config: Config, data: DatasetManifest) -> bool:
        """Whether batch `t` of this config is batch `t` of the parent."""
        ours = _settings(config.model_dump(mode="json"))
        same = all(self.settings.get(key, _BEFORE.get(key, ours[key])) == ours[key] for key in _ORDER)
        return same and self.manifest.state.get("dataset") == data.digest

    def record(self, config: Config, data: DatasetManifest) -> Origin:
        """Returns what a branch writes down about its origin."""
        state = self.manifest.state
        same_store = self.settings.get("tracking.uri") == json.dumps(config.tracking.uri)
        found = {
            "from": str(self.folder.resolve()),
            "digest": self.digest,
            "step": self.manifest.step,
            "what": config.init.what,
            "mlflow_run_id": state.get("mlflow_run_id") if same_store else None,
            "differences": self.differences(config, data),
            "ancestors": lineage(state.get("init")),
        }
        return cast(Origin, found)


def _settings(tree: dict[str, Any]) -> dict[str, str]:
    return {key: json.dumps(value, sort_keys=True) for key, value in flatten(tree)}
