"""What sbatch says when it refuses a job, as one message that names what to change."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.support import FakeSlurm, submit, write_files

POLICY = (
    "Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"
)
REFUSALS = {
    "partition": ("error: invalid partition specified: nope\nsbatch: error: Batch job submission failed: Invalid "
                  "partition name specified", 2, ["prepare.partition", "nope", "partitions here: main, high"]),
    "nodes": ("error: Batch job submission failed: Node count specification invalid", 2, ["prepare.nodes", "%D"]),
    "nodes of the partition": ("error: Batch job submission failed: Requested node configuration is not available", 2,
                               ["prepare.nodes"]),
    "memory": ("error: Memory specification can not be satisfied\nsbatch: error: Batch job submission failed: "
               "Requested node configuration is not available", 2, ["prepare.mem_gb"]),
    "account": ("error: Batch job submission failed: Invalid account or account/partition combination specified", 2,
                ["site.yaml: account", "sacctmgr"]),
    "qos": ("error: Batch job submission failed: Invalid qos specification", 2, ["site.yaml: qos"]),
    "time": ("error: Batch job submission failed: Requested time limit is invalid (missing or exceeds some limit)", 2,
             ["prepare.time_limit_min"]),
    "controller": ("error: Batch job submission failed: Unable to contact slurm controller (connect failure)", 1,
                   ["controller does not answer", "scontrol ping"]),
    "quota": ("error: QOSMaxSubmitJobPerUserLimit\nsbatch: error: Batch job submission failed: Job violates "
              "accounting/QOS policy (job submit limit, user's size and/or time limits)", 1, ["squeue --me"]),
    "quota of the account": (f"error: AssocMaxSubmitJobLimit\nsbatch: error: {POLICY}", 1, ["Wait", "squeue --me"]),
    "no limit in particular": (f"error: {POLICY}", 1, ["a limit of your account or QOS", "squeue --me", "site.yaml"]),
    "wall time of the QOS": (f"error: QOSMaxWallDurationPerJobLimit\nsbatch: error: {POLICY}", 2,
                             ["site.yaml: prepare.time_limit_min", "sacctmgr show qos"]),
    "nodes of the QOS": (f"error: QOSMaxNodePerJobLimit\nsbatch: error: {POLICY}", 2, ["site.yaml: prepare.nodes"]),
    "GPUs of the QOS": (f"error: QOSMaxGRESPerJob\nsbatch: error: {POLICY}", 2, ["site.yaml: prepare.gpus_per_node"]),
    "least GPUs": (f"error: QOSMinGRES\nsbatch: error: {POLICY}", 2, ["site.yaml: prepare.gpus_per_node"]),
    "cores of the account": (f"error: AssocMaxCpuPerJobLimit\nsbatch: error: {POLICY}", 2,
                             ["site.yaml: prepare.cpus_per_task"]),
    "memory of the QOS": (f"error: QOSMaxMemoryPerNode\nsbatch: error: {POLICY}", 2, ["site.yaml: prepare.mem_gb"]),
    "array": ("error: Batch job submission failed: Invalid job array specification", 2,
              ["site.yaml: prepare.slices", "MaxArraySize"]),
    "other": ("error: Batch job submission failed: I/O error writing script/environment to file", 1, ["I/O error"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_refusal_is_one_message_with_its_cure_and_leaves_nothing(tmp_path: Path, slurm: FakeSlurm, kind: str):
    words, status, expected = REFUSALS[kind]
    write_files(tmp_path)
    slurm.says("sbatch", err=f"sbatch: {words}\n", status=1, call=1)
    slurm.says("sinfo", "main\nhigh\n")
    done = submit(tmp_path, slurm)
    assert done.status == status
    assert done.err.startswith("pipeline: error: ")
    assert done.err.count("\n") == 1
    for word in (*expected, "othing was submitted"):
        assert word in done.err
    assert not (tmp_path / "runs/tiny").exists()


def test_a_sweep_with_too_many_values_names_the_sweep(tmp_path: Path, slurm: FakeSlurm):
    write_files(tmp_path)
    words = "error: Batch job submission failed: Invalid job array specification"
    slurm.says("sbatch", err=f"sbatch: {words}\n", status=1, call=2)
    done = submit(tmp_path, slurm, "--sweep", "train.seed=1,2")
    assert done.status == 2
    assert done.err.startswith("pipeline: error: --sweep: ") and "MaxArraySize" in done.err
