"""Files and folders that other users of the machine can neither read nor change."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from pipeline.errors import UsageError
from pipeline.files import fsync_dir, naming, of_file


def write_private(path: Path, content: bytes) -> None:
    """Publishes a file whole that only this user can read, whatever the umask says.

    Raises:
        OSError: It cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, temp = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)  # mode 0600
    try:
        with of_file(path), os.fdopen(fd, "wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        Path(temp).replace(path)
    except OSError:
        Path(temp).unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


def make_private(folder: Path, what: str, cure: str) -> os.stat_result:
    """Creates a folder that only this user can enter, or makes sure that an existing one is; returns its status.

    What is executed later may lie only in such a folder. In `/tmp` anyone can create a folder, or a link, of any name.

    Args:
        folder: The folder.
        what: What is kept there: `compiled code`.
        cure: What the user can change.

    Raises:
        UsageError: It is a link, or others own it or may write into it.
        PipelineError: It cannot be created.
    """
    with naming(folder, f"{what} cannot be kept there", cure):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022:
            folder.chmod(0o700)  # earlier versions made it with the umask's mode: others could only read
            return found
    raise UsageError(f"{folder}: {what} is executed, and other users could write it here; remove it, or {cure}")


def refuse_shared(file: Path, why: str) -> None:
    """Makes sure that a file is this user's and that others can neither read nor change it.

    Raises:
        UsageError: It cannot be looked at, is another user's, or others may read or write it.
    """
    with naming(file, "cannot be read", error=UsageError):
        found = file.stat()
    if found.st_uid != os.geteuid():
        raise UsageError(f"{file}: belongs to another user; {why}: use a file of your own")
    if found.st_mode & 0o077:
        raise UsageError(f"{file}: other users may read or change it, and {why}; chmod 600 {file}")
