"""Environments for the peers of a benchmark, whose packages agree neither with ours nor with each other's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent


def peer_environment(name: str, *installs: Sequence[str]) -> Path:
    """Returns the Python of build/NAME, which the first call makes; each of `installs` is one call of pip."""
    folder = ROOT / "build" / name
    python = folder / "bin" / "python"
    if not (folder / "done").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        for words in installs:
            subprocess.run([python, "-m", "pip", "install", "--quiet", *words], check=True)
        (folder / "done").touch()
    return python
