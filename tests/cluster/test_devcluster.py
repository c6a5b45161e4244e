"""The devcluster is a real Slurm: it keeps the promises of a cluster and leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.devcluster.hosts import run_on
from tests.cluster.support import ENDED, ROOT, Cluster, open_cluster, pipeline, wait_until

PYTHON = sys.executable


@pytest.fixture(autouse=True)
def _no_jobs_left(cluster: Cluster) -> Iterator[None]:
    yield
    cluster.cancel_all()


def test_every_host_has_its_own_name_address_and_tmp(cluster: Cluster) -> None:
    seen = cluster.run(
        "srun", "--nodes=5", "sh", "-c",
        "touch /tmp/of-$SLURMD_NODENAME; sleep 1; "
        "echo $(hostname) $(ip -oneline -4 address show eth0 | grep -o '10[0-9.]*' | head -1) /tmp/of-*",
    ).splitlines()  # fmt: skip
    addresses = [cluster.settings.address(node) for node in cluster.nodes]
    assert sorted(seen) == [f"{n} {a} /tmp/of-{n}" for n, a in zip(cluster.nodes, addresses, strict=True)]


def test_four_ranks_on_two_nodes_sum_over_the_network(cluster: Cluster) -> None:
    program = """
import os, socket, torch, torch.distributed as dist
rank, size = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
dist.init_process_group("gloo", init_method=f"tcp://{os.environ['FIRST']}:29400", rank=rank, world_size=size)
total = torch.tensor([rank + 1])
dist.all_reduce(total)
dist.barrier()
dist.destroy_process_group()
print(socket.gethostname(), int(total), flush=True)
"""
    (cluster.work / "sum.py").write_text(program)
    job = cluster.sbatch(
        "export FIRST=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -1) OMP_NUM_THREADS=1\n"
        f"srun --error=/dev/null {PYTHON} sum.py",
        "--nodes=2", "--ntasks-per-node=2", "--mem=2G",
    )  # fmt: skip
    ended = cluster.wait_for_state(job, ENDED, 120)
    assert ended["JobState"] == "COMPLETED", cluster.output(job)
    first, second = cluster.nodes_of(job)
    assert sorted(cluster.output(job).splitlines()) == [f"{first} 10"] * 2 + [f"{second} 10"] * 2


def test_a_job_whose_node_loses_power_restarts_on_another_node(cluster: Cluster) -> None:
    job = cluster.sbatch("srun sh -c 'echo restarts: ${SLURM_RESTART_COUNT:-0}; sleep 300'", "--nodes=2")
    cluster.wait_for_output(job, "restarts: 0\nrestarts: 0\n")
    _, lost = cluster.nodes_of(job)
    cluster.kill_node(lost)
    try:
        cluster.wait_for_output(job, "restarts: 1\nrestarts: 1\n", 120)
        after = cluster.wait_for_state(job, {"RUNNING"})
        assert after["Restarts"] == "1"
        assert lost not in cluster.nodes_of(job)
        cluster.cancel_all()
    finally:
        cluster.start_node(lost)
    assert cluster.run("srun", f"--nodelist={lost}", "hostname") == f"{lost}\n"


def test_the_other_hosts_reach_a_node_at_once_after_its_power_failure(cluster: Cluster) -> None:
    settings = cluster.settings
    first, second = cluster.nodes[:2]
    connect = f"import socket; socket.create_connection(('{settings.address(second)}', 6818), 2)"

    def reach_it() -> None:
        for host in ("login", first):
            answer = run_on(settings, host, [sys.executable, "-I", "-c", connect])
            assert answer.returncode == 0, (host, answer.stderr)
        # A host whose own address changes is as hard to reach.
        assert "02:00:0a:42:00:01" in run_on(settings, "login", ["ip", "-brief", "link", "show", "br0"]).stdout

    reach_it()
    for _ in range(2):
        cluster.kill_node(second)
        cluster.start_node(second)
        reach_it()


def test_a_preempted_job_receives_its_signal_before_it_ends(cluster: Cluster) -> None:
    (cluster.work / "trap.sh").write_text("trap 'echo signal; exit 0' USR2; echo ready; while :; do sleep 0.1; done\n")
    low = cluster.sbatch("srun sh trap.sh", "--partition=low", "--exclusive", "--nodes=5", "--signal=USR2@60")
    cluster.wait_for_output(low, "ready\n" * 5)
    high = cluster.sbatch("sleep 1", "--partition=high", "--exclusive")
    cluster.wait_for_output(low, "signal\n" * 5, 30)
    assert cluster.wait_for_state(high, ENDED, 60)["JobState"] == "COMPLETED"


def test_jobs_continue_while_the_controller_restarts(cluster: Cluster) -> None:
    job = cluster.sbatch("echo ready; until [ -e go ]; do sleep 0.1; done; echo done")
    cluster.wait_for_output(job, "ready")
    cluster.restart_controller()
    (cluster.work / "go").touch()
    ended = cluster.wait_for_state(job, ENDED)
    assert (ended["JobState"], ended["Restarts"], cluster.output(job)) == ("COMPLETED", "0", "ready\ndone\n")


def test_accounting_answers_and_rejects_unknown_accounts(cluster: Cluster) -> None:
    job = cluster.sbatch("exit 3", "--account=teaching")
    cluster.wait_for_state(job, {"FAILED"})
    asked = ["sacct", "--jobs", job, "--allocations", "--noheader", "--parsable2", "--format=State,ExitCode,Account"]
    wait_until(lambda: cluster.run(*asked) == "FAILED|3:0|teaching\n", 30, lambda: cluster.run(*asked))
    refused = subprocess.run(
        [cluster.settings.bin / "sbatch", "--account=nobody", "--wrap=true"],
        env=cluster.env,
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 1
    assert "Invalid account" in refused.stderr


def test_gpus_are_assigned_to_one_job_each(cluster: Cluster) -> None:
    # The devices are simulated: opening one fails either way, but that of another job fails with a permission error.
    script = f"""
for i in 0 1 2 3; do cat {cluster.settings.state}/dev/gpu$i 2>&1 | grep -q 'not permitted' && refused+=($i); done
echo "mine $SLURM_JOB_GPUS, refused ${{refused[@]}}"
until [ -e gpus-seen ]; do sleep 0.1; done"""
    options = [f"--nodelist={cluster.nodes[0]}", "--mem=500M"]
    jobs = [cluster.sbatch(script, "--gpus-per-node=2", *options) for _ in range(2)]
    for job in jobs:
        cluster.wait_for_output(job, "\n")
    third = cluster.sbatch("true", "--gpus-per-node=1", *options)
    confined = cluster.settings.cgroups
    assert sorted(cluster.output(job).strip() for job in jobs) == [
        "mine 0,1, refused 2 3" if confined else "mine 0,1, refused",
        "mine 2,3, refused 0 1" if confined else "mine 2,3, refused",
    ]
    assert cluster.show(third)["JobState"] == "PENDING"
    (cluster.work / "gpus-seen").touch()
    for job in [*jobs, third]:
        assert cluster.wait_for_state(job, ENDED)["JobState"] == "COMPLETED"


def test_down_leaves_nothing_behind_and_two_clusters_run_side_by_side(cluster: Cluster) -> None:
    folder = Path(tempfile.mkdtemp(prefix="cl-", dir=ROOT / "build"))
    state = folder / "state"
    before = _traces(state)
    pipeline("devcluster", "up", "--state", str(state), "--nodes", "1")
    try:
        other = open_cluster(state, folder / "work")
        assert other.nodes != cluster.nodes[:1]
        job = other.sbatch("sleep 100 & disown; echo ready; sleep 100")
        other.wait_for_output(job, "ready")
        namespaces = {_namespace(Path("/proc") / p.read_text().split()[0]) for p in (state / "run").glob("*.host")}
        assert len(namespaces) == 2
        assert namespaces <= _namespaces()
        assert cluster.run("srun", "hostname").strip() in cluster.nodes
    finally:
        pipeline("devcluster", "down", "--state", str(state))
    assert not state.exists()
    assert not namespaces & _namespaces()
    shutil.rmtree(folder)
    assert not list(Path("/sys/fs/cgroup").glob(f"*/slurm_{other.nodes[0]}"))
    assert _traces(state) == before


def test_mistakes_are_one_clear_message(cluster: Cluster) -> None:
    state = str(cluster.settings.state)
    for args, status, message in [
        (["kill-node", "7", "--state", state], 2, ", ".join(cluster.nodes)),
        (["start-node", "1", "--state", state], 2, f"{cluster.nodes[0]} is already up"),
        (["up", "--state", state], 2, "cluster of 5 nodes"),
        (["up", "--state", str(ROOT / "tests")], 2, "holds other files"),
        (["up", "--state", "/" + "x" * 99], 2, "80 characters"),
        (["status", "--state", "nowhere"], 1, "no devcluster in"),
        (["down", "--state", "nowhere"], 1, "no devcluster in"),
    ]:
        done = pipeline("devcluster", *args, check=False)
        assert done.returncode == status, done.stderr
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


def _traces(state: Path) -> dict[str, list[str]]:
    """Returns what a cluster could leave on the machine: processes, mounts, network devices and files of Slurm."""
    processes = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:  # it has ended
            continue
        if os.fsencode(state) in words:
            processes.append(process.name)
    places = ["/run/slurm*", "/run/munge*", "/run/mysqld*", "/var/lib/slurm*", "/var/lib/mysql/*", "/var/log/slurm*"]
    return {
        "processes": processes,
        "mounts": [m for m in Path("/proc/mounts").read_text().splitlines() if str(state) in m],
        "network": sorted(p.name for p in Path("/sys/class/net").iterdir()),
        "files": sorted(str(p) for place in places for p in Path("/").glob(place[1:])),
    }


def _namespace(process: Path) -> str:
    return str((process / "ns" / "net").readlink())


def _namespaces() -> set[str]:
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            found.add(_namespace(process))
        except OSError:  # it has ended
            continue
    return found
