"""`pipeline verify`: compares a dataset, a checkpoint or a whole run with its checksums."""

from __future__ import annotations

from pathlib import Path

from pipeline.checkpoint import layout
from pipeline.data.layout import MANIFEST, PLAN
from pipeline.data.manifest import DatasetManifest
from pipeline.errors import CheckpointError, PipelineError, UsageError, listing
from pipeline.files import read_json
from pipeline.run.folder import CHECKPOINT_MANIFEST, Run, open_run
from pipeline.text_format import located, megabytes


def verify_path(path: str, token_folder: str | None = None) -> str:
    """Reads every byte of a dataset, a checkpoint or a run and returns a report of what matches its manifest.

    Raises:
        UsageError: The folder is none of them.
        PipelineError: Something is missing or damaged; the message names it.
    """
    folder = Path(path)
    if _is_dataset(folder):
        return _verify_dataset(folder, token_folder)
    if (folder / CHECKPOINT_MANIFEST).exists():
        return _verify_checkpoint(folder)
    if folder.is_file() or not folder.exists() or Run(folder).config_file.exists():
        return _verify_run(open_run(path))
    raise UsageError(
        f"{located(path)}: is neither a dataset nor a checkpoint (it has no {CHECKPOINT_MANIFEST}), "
        f"nor a run (it has no {Run(folder).config_file.name})"
    )


def _is_dataset(folder: Path) -> bool:
    """Whether there is a plan (of a dataset that may be unfinished) or a manifest with the keys of a dataset's."""
    if (folder / PLAN).exists():
        return True
    manifest = folder / MANIFEST
    tree = read_json(manifest, folder) if manifest.exists() else None
    return isinstance(tree, dict) and "tokenizer_digest" in tree


def _verify_run(run: Run) -> str:
    """Verifies the dataset and every checkpoint, also after one is found damaged."""
    intact: list[str] = []
    damaged: list[PipelineError] = []
    dataset = Path(run.config().data.path)
    checkpoints = list(reversed(layout.published(run.checkpoints)))
    for folder in checkpoints:
        try:
            intact.append(_verify_checkpoint(folder))
            _check_dataset_of(folder, dataset)
        except PipelineError as error:
            damaged.append(error)
    if not checkpoints:
        intact.append(f"{run.checkpoints}: holds no checkpoint yet")
    missing = not _is_dataset(dataset)
    try:
        if not missing:
            intact.append(_verify_dataset(dataset, run.config().data.token_folder))
    except PipelineError as error:
        damaged.append(error)
    if missing:
        intact.append(f"{located(dataset)}: there is no dataset here, so it could not be verified")
    if missing and not damaged:
        cure = "A relative path counts from the working folder: run this in the folder in which the run was trained."
        raise PipelineError(listing(f"{run.path}: its dataset was not found:", intact, cure))
    if damaged:
        raise PipelineError(listing(f"{run.path}: {len(damaged)} damaged:", [*damaged, *intact]))
    return "\n".join(intact)


def _check_dataset_of(checkpoint: Path, dataset: Path) -> None:
    trained_on = layout.Manifest.load(checkpoint).state.get("dataset")
    if trained_on is None or not (dataset / MANIFEST).exists():
        return
    digest = DatasetManifest.load(dataset).digest
    if digest != trained_on:
        raise CheckpointError(
            f"{checkpoint}: was trained on the dataset {trained_on[:12]}, but {dataset} is now {digest[:12]}"
        )


def _verify_checkpoint(folder: Path) -> str:
    from pipeline.checkpoint.read import verify  # imports torch, which a dataset does not need

    return f"{folder}: all files of the checkpoint match its manifest ({len(verify(folder).files):,})"


def _verify_dataset(folder: Path, token_folder: str | None) -> str:
    from pipeline.data.build.display import Display
    from pipeline.data.verify import verify_dataset

    with Display("verify") as display:
        done = verify_dataset(folder, display.bytes, token_folder)
    contents = f"all {done.files:,} files ({megabytes(done.bytes)}) of the dataset {done.digest[:12]}"
    return f"{folder}: {contents} match its manifest"
