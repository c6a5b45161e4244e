"""Where compiled blocks are kept, so that a requeued job does not compile again: in the run folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from pipeline.files import naming
from pipeline.run.private import make_private

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
"""PyTorch's own setting; Triton's cache lies inside it. A user's value wins."""


def keep_compiled(folder: Path) -> None:
    """Makes torch.compile keep its results in a folder of the run.

    PyTorch unpickles them, so no other user may write there, and those of a copied run folder, which may come from
    anyone, are thrown away: a mark in the folder names its inode, and a copy has another.

    Raises:
        UsageError: Others may write into the folder.
    """
    if VARIABLE in os.environ:
        return
    cure = f"set {VARIABLE} to a folder that only you can open"
    found = make_private(folder, "compiled code", cure)
    with naming(folder, "compiled code cannot be kept there", cure):
        mark = folder / f"of_inode_{found.st_ino}"
        if not mark.exists():
            for entry in list(folder.iterdir()):
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
            mark.touch()
    os.environ[VARIABLE] = str(folder.absolute())
