"""Slurm's input variables: what a shell may set to change every command of Slurm, and through them every job.

They win over the options of a batch script, and a job inherits those of srun from the submitting shell:
`SBATCH_EXPORT=NONE` leaves a job without its PATH, `SLURM_BITSTR_LEN` cuts the lists of array tasks short. The site
file says what jobs request; everything else is hidden from the commands that the launcher starts.
"""

from __future__ import annotations

from collections.abc import Mapping

_PREFIXES = (
    "SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SACCT_", "SINFO_", "SCONTROL_", "SCANCEL_",
)  # fmt: skip
# They say which cluster this is and who asks.
_KEPT = frozenset({"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT"})


def is_input(name: str) -> bool:
    """Whether a variable can change what Slurm's commands do."""
    return name.startswith(_PREFIXES) and name not in _KEPT


def without_inputs(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables that Slurm's commands may see."""
    return {name: value for name, value in environ.items() if not is_input(name)}


def set_by_user(environ: Mapping[str, str]) -> list[str]:
    """Returns the names of the input variables of a shell, in order; those of an interactive job are its own."""
    of_job = ("SLURM_", "SLURMD_") if "SLURM_JOB_ID" in environ else ()
    return sorted(name for name in environ if is_input(name) and not name.startswith(of_job))
