"""Ranks from the environment."""

from __future__ import annotations

import pytest

from pipeline.errors import UsageError
from pipeline.run.world import World, first_host, world_from_environment

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "gpu[007-009]",
}


def test_alone_without_variables():
    assert world_from_environment({}) == World(0, 0, 1)


def test_torchrun_variables():
    worlds = [world_from_environment({**TORCHRUN, "RANK": str(rank)}) for rank in (3, 7)]
    assert worlds[0] == World(3, 1, 8, "node1", 29500, worlds[1].meeting)
    assert worlds[0].meeting != world_from_environment({**TORCHRUN, "MASTER_PORT": "29501"}).meeting


def test_torchrun_keeps_its_port_and_gives_each_restart_a_meeting_of_its_own():
    first, second = (
        world_from_environment({**TORCHRUN, "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": str(n)})
        for n in (0, 1)
    )
    assert first.master_port == 0
    assert first.meeting != second.meeting


def test_srun_variables_give_all_ranks_the_same_meeting():
    worlds = [world_from_environment({**SRUN, "SLURM_PROCID": str(rank)}) for rank in range(4)]
    assert [w.rank for w in worlds] == [0, 1, 2, 3]
    assert {(w.master_addr, w.master_port, w.size, w.meeting) for w in worlds} == {("gpu007", 0, 4, "77.0.0")}


@pytest.mark.parametrize("change", [{"SLURM_JOB_ID": "78"}, {"SLURM_STEP_ID": "1"}, {"SLURM_RESTART_COUNT": "1"}])
def test_another_job_step_or_attempt_is_another_meeting(change):
    assert world_from_environment({**SRUN, **change}).meeting != world_from_environment(SRUN).meeting


def test_a_port_that_the_site_names_is_the_port():
    assert world_from_environment({**SRUN, "MASTER_PORT": "29500"}).master_port == 29500


def test_the_name_of_a_meeting_is_no_path():
    with pytest.raises(UsageError, match="PIPELINE_MEETING"):
        world_from_environment({**TORCHRUN, "PIPELINE_MEETING": "../x"})


def test_torchrun_variables_go_before_those_of_slurm():
    assert world_from_environment({**SRUN, **TORCHRUN}).size == 8


def test_a_batch_script_outside_of_srun_is_alone():
    assert world_from_environment({"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}).size == 1


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("gpu[003-007,012],login", "gpu003"), ("n[5]", "n5"), ("n[1,3]-ib", "n1-ib")],
)
def test_the_first_host_of_a_list(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"RANK": None}, "lacks RANK"),
        ({"RANK": "x"}, "not a number"),
        ({"RANK": "8"}, "not below WORLD_SIZE=8"),
        ({"MASTER_PORT": None}, "MASTER_PORT"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT=99999"),
        ({"MASTER_PORT": "-1"}, "MASTER_PORT=-1"),
        ({"RANK": "9" * 5000}, "RANK"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1"),
    ],
)
def test_incomplete_or_wrong_variables_are_named(change, words):
    environment = {k: v for k, v in {**TORCHRUN, **change}.items() if v is not None}
    with pytest.raises(UsageError, match=words):
        world_from_environment(environment)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "1"}, "SLURM_PROCID=5"),
        ({"SLURM_PROCID": "-1"}, "SLURM_PROCID=-1"),
        ({"SLURM_RESTART_COUNT": "x"}, "SLURM_RESTART_COUNT"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT=99999"),
        ({"MASTER_PORT": "x"}, "MASTER_PORT"),
    ],
)
def test_wrong_variables_of_a_step_are_named(change, words):
    with pytest.raises(UsageError, match=words):
        world_from_environment({**SRUN, **change})


def test_exported_variables_read_back_equal():
    for port in (0, 4000):
        environment: dict[str, str] = {}
        world = World(1, 1, 2, "h", port, "77.0.0")
        world.export(environment)
        assert world_from_environment(environment) == world
