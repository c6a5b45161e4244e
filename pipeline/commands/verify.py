"""The checksums of a dataset, a checkpoint or a whole run: `pipeline verify`."""

from __future__ import annotations

from pathlib import Path

from pipeline.data.layout import MANIFEST, PLAN
from pipeline.errors import CheckpointError, PipelineError, UsageError
from pipeline.files import read_json
from pipeline.run.folder import CHECKPOINT_MANIFEST, Run, open_run


def verify_path(path: str) -> str:
    """Reads every byte of a dataset, a checkpoint or a run, compares it with the manifest, and says what was compared.

    Raises:
        UsageError: The folder is none of them.
        PipelineError: Something is missing or damaged; the message names it.
    """
    folder = Path(path)
    if _is_dataset(folder):
        return _verify_dataset(folder)
    if (folder / CHECKPOINT_MANIFEST).exists():
        return _verify_checkpoint(folder)
    if (folder / "config.yaml").exists():
        return _verify_run(open_run(folder))
    raise UsageError(
        f"{path}: is neither a dataset nor a checkpoint (it has no manifest.json), nor a run (it has no config.yaml)"
    )


def _is_dataset(folder: Path) -> bool:
    """By what the manifest says, as the other files of a dataset are not needed to read it; unfinished, by its plan."""
    manifest = folder / MANIFEST
    if (folder / PLAN).exists() or not manifest.exists():
        return (folder / PLAN).exists()
    tree = read_json(manifest)
    return isinstance(tree, dict) and "tokenizer_digest" in tree


def _verify_run(run: Run) -> str:
    """Every checkpoint and the dataset; one that is damaged does not keep the others from being looked at."""
    from pipeline.checkpoint.layout import Manifest, published

    lines, problems = [], []
    dataset = Path(run.config().data.path)
    checkpoints = list(reversed(published(run.checkpoints)))
    for folder in checkpoints:
        try:
            lines.append(_verify_checkpoint(folder))
            trained_on = Manifest.load(folder).state.get("dataset")
            if trained_on is not None and (dataset / MANIFEST).exists():
                _same_dataset(folder, trained_on, dataset)
        except PipelineError as error:
            problems.append(str(error))
    if not checkpoints:
        lines.append(f"{run.checkpoints}: holds no checkpoint yet")
    try:
        lines.append(_verify_dataset(dataset))
    except PipelineError as error:
        problems.append(str(error))
    if problems:
        raise PipelineError("\n  ".join([f"{run.path}: {len(problems)} damaged:", *problems, *lines]))
    return "\n".join(lines)


def _same_dataset(checkpoint: Path, trained_on: str, dataset: Path) -> None:
    from pipeline.data.manifest import DatasetManifest

    digest = DatasetManifest.load(dataset).digest
    if digest != trained_on:
        raise CheckpointError(
            f"{checkpoint}: was trained on the dataset {trained_on[:12]}, and {dataset} is {digest[:12]} now"
        )


def _verify_checkpoint(folder: Path) -> str:
    from pipeline.checkpoint.read import verify

    return f"{folder}: all {len(verify(folder).files):,} files of the checkpoint are what its manifest says"


def _verify_dataset(folder: Path) -> str:
    from pipeline.data.build.display import Display
    from pipeline.data.verify import verify_dataset

    with Display("verify") as display:
        done = verify_dataset(folder, display.bytes)
    return (
        f"{folder}: all {done.files:,} files ({done.bytes / 1e6:,.1f} MB) of the dataset {done.digest[:12]} "
        "are what its manifest says"
    )
