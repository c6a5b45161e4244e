"""The reason of a failed attempt is its cause: memory, a missing program, or what the rank said."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from pipeline.launch.job import attempt
from pipeline.launch.job.causes import last_words, rank_in_words, slurm_log
from pipeline.launch.site import Site
from pipeline.launch.slurm import job_records
from pipeline.launch.slurm.job_records import Job
from pipeline.launch.watch.status import statuses
from pipeline.run import attempts
from pipeline.run.attempts import AttemptEnded, RankFailed
from pipeline.run.folder import Run
from tests.launch.job.test_attempt import began, rank_ended, reason_given_up
from tests.launch.job.test_attempt import run as run
from tests.launch.support import SITE, FakeSlurm

# As Slurm 22.05 and later versions write it.
KILLED = {
    "srun": "srun: error: m2: task 1: Out Of Memory",
    "22.05": "slurmstepd-m1: error: Detected 1 oom-kill event(s) in StepId=1.0. Some of your processes may have been "
             "killed by the cgroup out-of-memory handler.",
    "24.05": "slurmstepd: error: Detected 1 oom_kill event in StepId=1.0. Some of the step tasks have been OOM Killed.",
}  # fmt: skip
AFTERMATH = "srun: Terminating StepId=2.0\nslurmstepd-m1: error: *** STEP 2.0 ON m1 CANCELLED AT X ***\n"


def reason(run: Run) -> str:
    return attempts.notes(run, "train").of(AttemptEnded)[-1].reason


@pytest.mark.parametrize("version", KILLED)
def test_memory_that_is_used_up_is_named_with_the_key_to_raise_and_tried_once_more(
    run: Run, slurm: FakeSlurm, version: str
):
    for number in range(2):
        now = rank_ended(began(run, number), 137)
        with slurm_log(now).open("a") as log:
            log.write(f"submitit INFO x\n{KILLED[version]}\n{AFTERMATH}")
        attempt.end(now, 137)
    assert reason(run) == (
        "out of memory: the kernel killed rank 1 on gpu2; raise train.mem_gb of the site, which is not set, so the "
        "partition's default holds"
    )
    assert slurm.calls("scontrol").count("requeue 7") == 1 and "failed 2 times" in reason_given_up(run)
    assert slurm.calls("sacct") == []


def test_what_an_earlier_attempt_left_in_the_log_is_not_the_cause_of_this_one(run: Run, slurm: FakeSlurm):
    slurm_log(began(run)).write_text(KILLED["srun"] + "\n")
    attempt.end(rank_ended(began(run, 1), 137), 137)
    assert reason(run) == "rank 1 on gpu2 was killed by signal 9"


@pytest.mark.parametrize(("accounting", "found"), [(True, True), (False, False)])
def test_accounting_is_asked_where_the_log_says_nothing(run: Run, slurm: FakeSlurm, accounting: bool, found: bool):
    slurm.says("sacct", "FAILED\nFAILED\nOUT_OF_MEMORY\n")
    now = rank_ended(began(run), 137)
    site = Site.model_validate({**SITE, "accounting": accounting, "train": {"nodes": 2, "mem_gb": 64}})
    attempt.end(replace(now, site=site), 137)
    assert reason(run).startswith("out of memory") == found
    assert ("is 64 GiB per node" in reason(run)) == found


def test_a_python_that_is_not_on_a_node_is_named_from_the_log_of_that_node(run: Run):
    now = began(run)
    missing = "slurmstepd-m2: error: execve(): /opt/python: No such file or directory"
    slurm_log(now).write_text("srun: error: m2: task 1: Exited with exit code 2\n" + AFTERMATH)
    (run.launch / "7_1_log.err").write_text(missing + "\n")
    attempt.end(now, 2)
    assert reason(run) == "srun ended with status 2: execve(): /opt/python: No such file or directory"


def test_an_error_is_told_before_the_traceback_that_leads_to_it(run: Run):
    now = began(run)
    lines = ["Traceback (most recent call last):", '  File "x"', "OSError: [Errno 28] No space left on device"]
    slurm_log(now).write_text("\n".join([*lines, AFTERMATH]))
    attempt.end(now, 1)
    assert reason(run) == "srun ended with status 1: OSError: [Errno 28] No space left on device"


def test_without_any_words_the_log_is_named(run: Run):
    now = began(run)
    attempt.end(now, 2)
    assert reason(run) == f"srun ended with status 2: see {slurm_log(now)}"


def test_a_failed_rank_is_told_with_its_last_error(run: Run):
    log = run.path / "some.log"
    log.write_text("RuntimeError: of an earlier attempt\n")
    first = log.stat().st_size
    assert last_words(log, first) == ""
    driver = "RuntimeError: The NVIDIA driver on your system is too old (found version 11040)."
    with log.open("a") as out:
        out.write(f"step 1\nTraceback (most recent call last):\n  File x\n{driver}\n[rank0]: W destroy\n\n")
    assert last_words(log, first) == driver
    image = "FATAL:   could not open image /x.sif: no such file or directory"
    log.write_text(f"{image}\n")
    note = RankFailed(rank=3, host="n2", status=255, said=last_words(log, 0))
    assert rank_in_words(note) == f"rank 3 on n2 ended with status 255: {image}"
    log.write_text("x" * 5000)
    assert len(last_words(log, 0)) < 400


def test_a_job_that_could_not_start_its_python_has_failed_with_the_line_of_slurms_log(run: Run, slurm: FakeSlurm):
    job_records.add_jobs(run, [Job("7", "train", 1, 1.0, "here", True, name="tiny-train")])
    slurm.says("sacct", "7|FAILED|gpu1|tiny-train\n")
    (run.launch / "7_0_log.err").write_text(
        "/var/spool/slurm_script: line 20: /opt/python: No such file or directory\n"
    )
    (status,) = statuses([run])
    assert status.state == "failed" and re.match("FAILED: /var/spool.*: /opt/python: No such file", status.reason)
