"""What only a GPU can show; where PyTorch sees none, the folder is skipped, in CI too."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="session")
def gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no GPU")
