"""What a run cost: every allocation counts, killed ones too, and energy is what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.run import attempts, journal
from pipeline.run.attempts import AttemptBegan, AttemptEnded, Charged
from pipeline.run.events import EventLog, Finished, Requeued, StartBegan, append
from pipeline.run.folder import Run
from pipeline.tracking.energy import EnergyMeter, gpu_energy
from pipeline.tracking.usage import Usage, usage

HOUR = 3600.0
T0 = 1_000_000.0


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = Run(tmp_path / "tiny")
    made.launch.mkdir(parents=True)
    return made


def began(run: Run, at: float, number: int = 0, job: str = "7", stage: str = "train", gpus: int = 16) -> None:
    attempts.note(run, AttemptBegan(time=T0 + at, stage=stage, job=job, attempt=number, gpus=gpus, cpus=2 * gpus or 8))


def ended(run: Run, at: float, number: int = 0, job: str = "7", stage: str = "train") -> None:
    attempts.note(run, AttemptEnded(time=T0 + at, stage=stage, job=job, attempt=number))


def cost(run: Run, now: float | None = None, charged: tuple[Charged, ...] = ()) -> Usage:
    found = usage(run, EventLog.load(run.events_file), None if now is None else T0 + now, charged)
    assert found is not None
    return found


def test_failed_attempts_are_charged_too_and_the_queue_is_not(run: Run):
    began(run, 0, gpus=0, job="6", stage="prepare")
    ended(run, HOUR / 2, job="6", stage="prepare")
    began(run, 2 * HOUR)
    ended(run, 3 * HOUR)
    began(run, 10 * HOUR, 1)
    ended(run, 12 * HOUR, 1)
    found = cost(run)
    assert (found.allocations, found.gpu_hours, found.cpu_core_hours) == (3, 48.0, 96 + 4.0)
    assert found.summary() == "48.00 GPU-hours in 3 allocations; energy not measured"


def test_attempts_on_the_same_nodes_are_one_allocation(run: Run):
    for number, allocation in ((0, 0), (1, 0), (2, 1)):
        note = AttemptBegan(
            time=T0 + number * HOUR, stage="train", job="7", attempt=number, gpus=16, cpus=32, allocation=allocation
        )
        attempts.note(run, note)
        ended(run, (number + 1) * HOUR, number)
    assert (cost(run).allocations, cost(run).gpu_hours) == (2, 48.0)


def test_a_killed_attempt_counts_to_its_last_sign_of_life(run: Run):
    began(run, 0)
    append(run.events_file, StartBegan(time=T0 + 60, number=1))
    append(run.events_file, Requeued(time=T0 + 5 * HOUR))  # by the launcher, when the node was long dead
    began(run, 5 * HOUR + 10, 1)
    append(run.events_file, StartBegan(time=T0 + 5 * HOUR + 60, number=2, last_seen=T0 + HOUR))
    append(run.events_file, Finished(time=T0 + 6 * HOUR + 10))
    assert cost(run).gpu_hours == pytest.approx(16 * 2)


def test_an_attempt_that_runs_counts_up_to_now(run: Run):
    began(run, 0)
    run.metrics_file.write_bytes(journal.encode({"step": 1, "time": T0 + HOUR / 2}))
    assert cost(run).gpu_hours == pytest.approx(8)
    assert cost(run, now=HOUR).gpu_hours == pytest.approx(16)


def test_a_dead_task_of_a_stage_that_is_over_does_not_count_up_to_now(run: Run):
    began(run, 0, job="6_0", stage="prepare")
    began(run, HOUR, job="7")
    assert cost(run, now=2 * HOUR).gpu_hours == pytest.approx(16)


def test_slurm_s_account_replaces_the_attempts_own_and_adds_those_that_left_no_record(run: Run):
    began(run, 20)  # after a prolog, then killed
    began(run, 2 * HOUR + 20, 1)
    ended(run, 3 * HOUR, 1)
    rows = (
        Charged(job="7", began=T0, seconds=HOUR, gpus=16, cpus=64, energy_j=3.6e6),
        Charged(job="7", began=T0 + 1.5 * HOUR, seconds=60, gpus=16, cpus=64),
        Charged(job="7", began=T0 + 2 * HOUR, seconds=HOUR, gpus=0, cpus=64, energy_j=7.2e6),
    )
    found = cost(run, charged=rows)
    assert found.allocations == 3
    assert found.gpu_hours == pytest.approx(16 * (2 + 1 / 60)), "where Slurm counts no GPUs, those requested"
    assert found.node_kwh == pytest.approx(3.0)
    for row in rows:
        attempts.note(run, row)
    assert cost(run) == found, "as the launcher recorded it"
    assert cost(run, charged=rows) == found, "not twice"


def test_a_run_without_gpus_says_core_hours(run: Run):
    began(run, 0, gpus=0)
    ended(run, HOUR)
    assert cost(run).hours() == "8.00 CPU-core-hours"


def test_a_run_of_which_nothing_is_known_has_no_cost(run: Run):
    assert usage(run, EventLog()) is None


def sampled(run: Run, node: str, powers: list[tuple[float, list[float]]]) -> None:
    """Samples as the sampler of a node writes them, from one start."""
    file = run.system_metrics / f"{node}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    newest = journal.last_step(file)
    meter = EnergyMeter(newest or {}, f"system/{node}/")
    step = int(newest["step"]) + 1 if newest else 0
    with journal.Writer(file) as writer:
        for at, watts in powers:
            sample = {f"gpu_{i}_power_usage_watts": value for i, value in enumerate(watts)}
            named = {f"system/{node}/{k}": v for k, v in (sample | meter.add(at, sample)).items()}
            writer.write(journal.encode({"step": step, "time": T0 + at, **named}))
            step += 1


def test_energy_is_the_integral_of_the_power_of_all_nodes_and_starts_but_not_of_what_lies_between(run: Run):
    sampled(run, "gpu1", [(0, [100.0, 300.0]), (10, [300.0, 500.0]), (20, [300.0, 500.0])])  # 6,000 J + 8,000 J
    sampled(run, "gpu2", [(0, [100.0, 100.0]), (10, [100.0, 100.0])])  # 2,000 J
    sampled(run, "gpu1", [(5000, [100.0, 100.0]), (5010, [100.0, 100.0])])  # another start: 2,000 J
    sampled(run, "gpu2", [(5000, [])])  # no power can be read any more
    assert gpu_energy(run) == (18_000.0, 2 * (20 + 10 + 10))
    began(run, 0)
    ended(run, HOUR)
    found = cost(run)
    assert found.gpu_kwh == pytest.approx(18_000 / 3.6e6)
    assert found.metered_gpu_hours == pytest.approx(80 / 3600)


def test_a_gap_in_the_samples_is_not_filled(run: Run):
    sampled(run, "n", [(0, [100.0]), (10, [100.0]), (3000, [100.0]), (3010, [100.0])])
    assert gpu_energy(run) == (2000.0, 20.0)
    sampled(run, "m", [(0, [100.0]), (10, []), (20, [100.0]), (30, [100.0])])
    assert gpu_energy(run) == (3000.0, 30.0)


def test_a_node_without_gpus_has_no_energy_of_gpus(run: Run):
    sampled(run, "n", [(0, []), (10, [])])
    assert gpu_energy(run) is None and usage(run, EventLog()) is None


def test_energy_on_a_machine_without_slurm_is_told_without_allocations(run: Run):
    sampled(run, "n", [(0, [360.0]), (10, [360.0])])
    found = cost(run)
    assert found.summary().startswith("energy 0.001 kWh") and "usage/gpu_hours" not in found.metrics()
