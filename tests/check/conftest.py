"""The checks ask the same pretended Slurm as the launcher's tests."""

from tests.launch.conftest import slurm as slurm
