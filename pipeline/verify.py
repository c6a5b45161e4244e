"""The checksums of a dataset or a checkpoint: `pipeline verify`."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import UsageError


def verify_path(path: str) -> str:
    """Reads every byte of a dataset or a checkpoint, compares it with the manifest, and says what was compared.

    Raises:
        UsageError: The folder is neither.
        PipelineError: Something is missing or damaged; the message names it.
    """
    from pipeline.data.plan import PLAN

    folder = Path(path)
    if (folder / PLAN).exists():
        return _verify_dataset(folder)
    if not (folder / "manifest.json").exists():
        raise UsageError(f"{path}: is neither a dataset nor a checkpoint (it has no manifest.json)")
    from pipeline.checkpoint.read import verify

    return f"{path}: all {len(verify(folder).files):,} files of the checkpoint are what its manifest says"


def _verify_dataset(folder: Path) -> str:
    from pipeline.data.display import Display
    from pipeline.data.verify import verify_dataset

    with Display("verify") as display:
        done = verify_dataset(folder, display.bytes)
    return (
        f"{folder}: all {done.files:,} files ({done.bytes / 1e6:,.1f} MB) of the dataset {done.digest[:12]} "
        "are what its manifest says"
    )
