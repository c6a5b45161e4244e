"""What arrives in a sqlite store, read back through MLflow's own client."""

import json
import time

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline import tracking
from pipeline.files import write_json, write_text
from pipeline.run import attempts, journal
from pipeline.run.attempts import AttemptBegan
from pipeline.run.events import Cancelled, Checkpointed, Finished, Started, Submitted, append
from pipeline.tracking.upload.sync import register_export, sync
from tests.launch.support import BASE, branched
from tests.tracking.support import (
    acknowledged,
    begin,
    log_steps,
    make_run,
    of_journal,
    of_mlflow,
    open_store,
    read_history,
    task_evaluation,
    wait_for,
    write_task_evaluation,
)

STARTED = {"git": {"commit": "0123abc", "dirty": True}, "packages": {"torch": "2.13.0"}, "command": ["pipeline"],
           "image": None, "slurm_job_id": "7", "dataset": "d" * 64}  # fmt: skip


def test_a_run_is_recorded_with_everything_that_belongs_to_it(folder):
    run, config = make_run(folder)
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text("{}")
    tracker = tracking.start(
        run,
        config,
        step=0,
        provenance=STARTED,
        dataset={"name": "tokens", "digest": "d" * 64, "tokens": 1000},
        tokenizer_file=tokenizer,
    )
    attempts.note(run, AttemptBegan(time=time.time() - 3600, stage="train", job="7", gpus=8, cpus=64))
    tracker.event(Started(step=0))
    log_steps(tracker, 1, 30)
    checkpoint = run.checkpoints / "step_00000025"
    checkpoint.mkdir()
    write_text(checkpoint / "manifest.json", "{}")
    tracker.event(Checkpointed(step=25, path=str(checkpoint)))
    write_text(run.samples / "step_00000025.txt", "four score")
    tracker.event(Finished(step=30))
    tracker.close("FINISHED")

    store, run_id = open_store(run, config)
    there = store.read_run(run_id)
    assert of_mlflow(run, config) == of_journal(run)
    assert there.info.status == "FINISHED" and there.info.run_name == "try" and there.info.end_time
    assert there.data.params["model.d_model"] == "16"
    assert there.data.params["optimizer.betas"] == "[0.9, 0.95]"
    tags = there.data.tags
    assert tags["mlflow.source.git.commit"] == "0123abc" and tags["pipeline.dirty"] == "true"
    assert tags["pipeline.slurm_job_id"] == "7" and tags["pipeline.dataset"] == "d" * 64
    assert not [name for name in tags if "packages" in name or "command" in name], "the artifact has the rest"
    assert tags["pipeline.checkpoint"] == str(checkpoint) and len(tags["pipeline.checkpoint.digest"]) == 64
    (given,) = there.inputs.dataset_inputs
    assert given.dataset.name == "tokens" and given.dataset.digest == "d" * 36
    assert json.loads(given.dataset.profile)["digest"] == "d" * 64
    artifacts = folder / "artifacts" / "tests" / run_id / "artifacts"
    names = {str(p.relative_to(artifacts)) for p in artifacts.rglob("*") if p.is_file()}
    assert names == {
        "config.yaml", "tokenizer.json", "environment.txt", "provenance.json", "checkpoints.json", "events.jsonl",
        "samples/step_00000025.txt",
    }  # fmt: skip
    assert "torch==" in (artifacts / "environment.txt").read_text()
    assert json.loads((artifacts / "checkpoints.json").read_text())[0]["step"] == 25
    assert json.loads((artifacts / "provenance.json").read_text())["starts"] == [STARTED]
    goodput = {k: v for k, v in there.data.metrics.items() if k.startswith("wall/")}
    parts = [v for k, v in goodput.items() if k not in ("wall/goodput", "wall/total_s")]
    assert sum(parts) == pytest.approx(goodput["wall/total_s"])
    cost = {k: v for k, v in there.data.metrics.items() if k.startswith("usage/")}
    assert cost.keys() == {"usage/gpu_hours", "usage/cpu_core_hours"}, "no energy was measured"
    assert 8 <= cost["usage/gpu_hours"] < 8.5
    assert cost["usage/cpu_core_hours"] == pytest.approx(8 * cost["usage/gpu_hours"])
    assert "GPU-hours in 1 allocation" in tags["pipeline.usage"] and "not measured" in tags["pipeline.usage"]


def test_an_evaluation_becomes_metrics_of_its_checkpoint_once(folder):
    run, config = make_run(folder)
    tracker = begin(run, config)
    log_steps(tracker, 1, 10)
    tracker.event(Checkpointed(step=10))
    tracker.close("FINISHED")
    for _ in range(2):
        write_json(
            run.evaluation_file,
            {"step": 10, "loss": 2.5, "perplexity": 12.2, "bits_per_byte": 1.1, "tokens": 99,
             "sources": {"web": {"loss": 2.0, "bits_per_byte": 1.0, "tokens": 50}}},
        )  # fmt: skip
        write_task_evaluation(run, task_evaluation("arc", 10, 0.5, limit=9))
        sync(run)
    store, run_id = open_store(run, config)
    there = read_history(store, run_id)
    names = ("acc", "acc_stderr")
    assert [[(p.step, p.value) for p in there[f"tasks/arc_limit9/{n}"]] for n in names] == [[(10, 0.5)], [(10, 0.05)]]
    assert [(p.step, p.value) for p in there["evaluation/loss"]] == [(10, 2.5)]
    assert [(p.step, p.value) for p in there["evaluation/bits_per_byte"]] == [(10, 1.1)]
    assert [(p.step, p.value) for p in there["evaluation/web/loss"]] == [(10, 2.0)]


def test_points_arrive_while_training_runs(folder):
    run, config = make_run(folder)
    tracker = begin(run, config)
    log_steps(tracker, 1, 10)
    wait_for(lambda: acknowledged(run), 30)
    assert of_mlflow(run, config) == of_journal(run)
    store, run_id = open_store(run, config)
    assert store.read_run(run_id).info.status == "RUNNING"
    tracker.close("KILLED")
    assert store.read_run(run_id).info.status == "KILLED"


def test_a_resumed_run_continues_its_mlflow_run_without_duplicate_points(folder, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    run, config = make_run(folder)
    tracker = begin(run, config)
    log_steps(tracker, 1, 30)
    tracker.close("STOPPED")
    store, run_id = open_store(run, config)
    assert store.read_run(run_id).info.status == "RUNNING"
    tracker = begin(run, config, 17)
    log_steps(tracker, 18, 40)
    tracker.close("FAILED")
    assert store.read_run(run_id).info.status == "FAILED"
    tracker = begin(run, config, 40)
    wait_for(lambda: store.read_run(run_id).info.status == "RUNNING" or tracker.log(41, {"train/loss": 0.1}), 30)
    tracker.close("FINISHED")
    assert of_mlflow(run, config) == of_journal(run)
    assert [step for step, *_ in of_journal(run)["train/loss"]] == list(range(1, 42))
    assert open_store(run, config)[1] == run_id
    assert store.read_run(run_id).info.status == "FINISHED"


def test_a_stopped_run_is_running_only_while_a_scheduler_has_it(folder, monkeypatch):
    run, config = make_run(folder)
    begin(run, config).close("STOPPED")  # Ctrl-C on a laptop
    store, run_id = open_store(run, config)
    assert store.read_run(run_id).info.status == "KILLED"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    begin(run, config).close("STOPPED")
    assert store.read_run(run_id).info.status == "RUNNING"
    append(run.events_file, Cancelled())
    assert sync(run).status == "KILLED"
    assert store.read_run(run_id).info.status == "KILLED"
    append(run.events_file, Submitted())
    assert sync(run).status == "RUNNING"
    begin(run, config).close("FINISHED")
    assert store.read_run(run_id).info.status == "FINISHED"


def test_a_process_that_ends_after_its_successor_began_does_not_change_the_status(folder):
    run, config = make_run(folder)
    left_behind = begin(run, config)  # on a node given up as lost
    successor = begin(run, config)
    left_behind.close("FAILED")
    assert sync(run).status == "RUNNING"
    successor.close("FINISHED")
    assert sync(run).status == "FINISHED"


def test_refused_metrics_do_not_hold_back_the_rest(folder, caplog):
    run, config = make_run(folder)
    tracker = begin(run, config)
    for step in range(1, 6):
        tracker.log(step, {"train/loss": 1 / step, "no*such*name": 1.0})
    tracker.close("FINISHED")
    assert list(of_mlflow(run, config)) == ["train/loss"]
    assert of_mlflow(run, config)["train/loss"] == of_journal(run)["train/loss"]
    assert sum("no*such*name" in r.getMessage() for r in caplog.records) == 1


def test_nan_and_infinity_do_not_stop_the_upload(folder):
    run, config = make_run(folder)
    tracker = begin(run, config)
    tracker.log(1, {"train/loss": float("nan"), "train/grad_norm": float("inf")})
    tracker.log(2, {"train/loss": 1.0, "train/grad_norm": 1.0})
    tracker.close("FINISHED")
    there = of_mlflow(run, config)
    assert there["train/loss"][0][2] != there["train/loss"][0][2]
    assert there["train/grad_norm"][0][2] == 1.7976931348623157e308  # MLflow's value for infinity
    assert there["train/loss"][1][2] == 1.0


def test_a_branch_is_a_run_of_its_own_below_its_parent(folder):
    run, config = make_run(folder)
    tracker = begin(branched(run), config)
    log_steps(tracker, 5, 6)
    tracker.close("FINISHED")
    store, run_id = open_store(run, config)
    tags = store.read_run(run_id).data.tags
    assert (tags["pipeline.parent"], tags["pipeline.parent.step"]) == (BASE["from"], "4")
    assert tags["pipeline.parent.digest"] == BASE["digest"]
    assert tags["mlflow.parentRunId"] == "a1" != run_id


def test_a_param_that_changed_between_two_starts_has_a_tag(folder):
    run, config = make_run(folder)
    begin(run, config).close("STOPPED")
    run, config = make_run(folder, None, "train.log_interval=7")
    begin(run, config).close("FINISHED")
    store, run_id = open_store(run, config)
    data = store.read_run(run_id).data
    assert data.params["train.log_interval"] == "5" and data.tags["changed.train.log_interval"] == "7"


def test_a_param_that_was_changed_back_has_its_tag_updated(folder):
    for interval in (5, 7, 5):
        run, config = make_run(folder, None, f"train.log_interval={interval}")
        begin(run, config).close("STOPPED")
    store, run_id = open_store(run, config)
    tags = {k: v for k, v in store.read_run(run_id).data.tags.items() if k.startswith("changed.")}
    assert tags == {"changed.train.log_interval": "5"}


def test_an_exported_model_becomes_a_registered_version_that_names_its_checkpoint(folder):
    run, config = make_run(folder)
    tracker = begin(run, config)
    log_steps(tracker, 1, 20)
    tracker.event(Checkpointed(step=10, path="step_00000010", digest="1" * 64))
    tracker.event(Checkpointed(step=20, path="step_00000020", digest="2" * 64))
    tracker.close("FINISHED")
    store, run_id = open_store(run, config)
    for number, step in (("1", 20), ("2", 10)):
        export = run.exports / f"step_{step:08d}-hf"
        export.mkdir(parents=True)
        save_file({"a": np.zeros(1)}, export / "model.safetensors", {"format": "pt", "step": str(step)})
        assert register_export(run, export, "my-model") == number
        version = store._client.get_model_version("my-model", number)
        assert version.run_id == run_id and version.source.endswith(f"{run_id}/artifacts/export/{export.name}")
        assert version.tags == {
            "pipeline.run": "try",
            "pipeline.checkpoint": f"step_{step:08d}",
            "pipeline.checkpoint.step": str(step),
            "pipeline.checkpoint.digest": str(step // 10) * 64,
        }
        stored = folder / "artifacts" / "tests" / run_id / "artifacts" / "export" / export.name
        assert (stored / "model.safetensors").read_bytes() == (export / "model.safetensors").read_bytes()


def test_system_metrics_of_every_node_arrive_once(folder):
    run, config = make_run(folder)
    tracker = begin(run, config)
    log_steps(tracker, 1, 5)
    files = {node: run.tracking / "system" / f"{node}.jsonl" for node in ("n1", "n2")}
    files["n1"].parent.mkdir(parents=True)

    def sample(node, step):
        with journal.Writer(files[node]) as writer:
            line = {"step": step, "time": 1000.0 + step, f"system/{node}/gpu_0_power_usage_watts": 300.0 + step}
            writer.write(journal.encode(line))

    for node in files:
        sample(node, 0)
    sync(run)
    sample("n2", 1)
    tracker.close("FINISHED")
    sync(run)
    store, run_id = open_store(run, config)
    history = read_history(store, run_id)
    there = {key: [(p.step, p.value) for p in points] for key, points in history.items() if key.startswith("system/")}
    assert there == {
        "system/n1/gpu_0_power_usage_watts": [(0, 300.0)],
        "system/n2/gpu_0_power_usage_watts": [(0, 300.0), (1, 301.0)],
    }


def test_a_rank_that_samples_its_node_feeds_no_store(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr("pipeline.tracking.tracker.Helper", lambda *args: started.append(args))
    run, config = make_run(tmp_path)
    about = {"step": 0, "provenance": {}, "dataset": {}, "tokenizer_file": None, "enabled": False}
    for samples_node in (True, False):
        tracking.start(run, config, **about, samples_node=samples_node)
    assert started == [(run, None, 0)]


def test_ranks_other_than_the_first_record_nothing(tmp_path):
    run, config = make_run(tmp_path, "none")
    tracker = tracking.start(run, config, step=0, provenance={}, dataset={}, tokenizer_file=None, enabled=False)
    tracker.log(1, {"train/loss": 1.0})
    tracker.event(Started())
    tracker.rewind(0)
    tracker.close("FINISHED")
    assert not run.metrics_file.exists() and not run.events_file.exists() and not run.tracking.exists()
