"""The shell that submits changes no job and no answer of Slurm."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.launch.slurm.inputs import set_by_user, without_inputs
from tests.launch.support import FakeSlurm, pipeline, submit, write_files

# From the manual pages of sbatch, srun, squeue, sacct, sinfo, scontrol and scancel.
INPUTS = {
    "SBATCH_EXPORT": "NONE", "SBATCH_ACCOUNT": "other", "SBATCH_PARTITION": "debug", "SBATCH_TIMELIMIT": "1",
    "SBATCH_NO_REQUEUE": "1", "SBATCH_SIGNAL": "KILL@1", "SBATCH_ARRAY_INX": "1-3", "SBATCH_GPUS_PER_TASK": "1",
    "SBATCH_IGNORE_PBS": "1", "SBATCH_CLUSTERS": "far", "SLURM_CLUSTERS": "far", "SLURM_EXIT_ERROR": "0",
    "SLURM_EXPORT_ENV": "NONE", "SLURM_NTASKS": "9", "SLURM_CPU_BIND": "none", "SLURM_LABELIO": "1",
    "SLURM_KILL_BAD_EXIT": "0", "SLURM_STDOUTMODE": "/dev/null", "SLURM_DEBUG": "5", "SLURM_HINT": "nomultithread",
    "SRUN_EXPORT_ENV": "NONE", "SRUN_CPUS_PER_TASK": "3", "SRUN_ERROR": "/dev/null", "SQUEUE_STATES": "FAILED",
    "SQUEUE_FORMAT": "%u", "SACCT_FEDERATION": "1", "SLURM_TIME_FORMAT": "relative", "SLURM_BITSTR_LEN": "1",
    "SINFO_FORMAT": "%u", "SCANCEL_STATE": "PENDING", "SCONTROL_ALL": "1",
}  # fmt: skip


@pytest.fixture
def told(slurm: FakeSlurm) -> Path:
    """What Slurm's commands find in their environment."""
    seen = slurm.folder / "seen"
    for name in ("sbatch", "squeue", "sacct", "scontrol", "scancel", "sinfo"):
        script = slurm.folder / name
        script.write_text(script.read_text().replace("#!/bin/sh\n", f"#!/bin/sh\nenv >> {seen}\n"))
    return seen


def test_no_command_of_slurm_sees_an_input_variable_of_the_shell(
    tmp_path: Path, slurm: FakeSlurm, told: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**INPUTS, "SLURM_CONF": "/etc/slurm.conf"}.items():
        monkeypatch.setenv(name, value)
    write_files(tmp_path)
    done = submit(tmp_path, slurm)
    assert done.status == 0, done.err
    assert all(name in done.out for name in INPUTS) and "SLURM_CONF" not in done.out
    slurm.says("squeue", "102|RUNNING|None|||tiny-train\n")
    pipeline(tmp_path, "status", slurm=slurm)
    pipeline(tmp_path, "cancel", "runs/tiny", slurm=slurm)
    assert {"sbatch", "squeue", "scancel"} <= {call.split()[0] for call in (slurm.folder / "calls").open()}
    seen = {line.partition("=")[0] for line in told.read_text().splitlines()}
    assert not seen & set(INPUTS) and "SLURM_CONF" in seen and "PATH" in seen


def test_the_variables_of_an_interactive_job_are_hidden_without_a_word() -> None:
    inside = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURMD_NODENAME": "n1", "SBATCH_QOS": "high", "HOME": "/"}
    assert without_inputs(inside) == {"HOME": "/"}
    assert set_by_user(inside) == ["SBATCH_QOS"]
    assert set_by_user({"SLURM_NNODES": "2"}) == ["SLURM_NNODES"]
