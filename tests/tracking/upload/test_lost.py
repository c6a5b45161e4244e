"""The next round repairs what is lost, deleted, killed or unreachable on MLflow's side."""

import os
import shutil
import time

import pytest

from pipeline.errors import PipelineError
from pipeline.run.events import EventLog
from pipeline.run.folder import Run
from pipeline.tracking import upload_state
from pipeline.tracking.upload.sync import is_alive, sync
from tests.processes import free_port
from tests.tracking.support import (
    acknowledged,
    begin,
    log_steps,
    make_run,
    of_journal,
    of_mlflow,
    open_store,
    wait_for,
)


def test_a_run_deleted_in_mlflow_is_restored_and_complete(folder):
    run, config = make_run(folder)
    tracker = begin(run, config)
    log_steps(tracker, 1, 10)
    wait_for(lambda: acknowledged(run), 30)
    store, run_id = open_store(run, config)
    store._client.delete_run(run_id)
    log_steps(tracker, 11, 20)
    tracker.close("FINISHED")
    sync(run)
    assert of_mlflow(run, config) == of_journal(run)
    assert store.read_run(run_id).info.lifecycle_stage == "active"


def test_an_mlflow_run_whose_id_was_lost_is_found_again(folder):
    run, config = make_run(folder)
    tracker = begin(run, config)
    log_steps(tracker, 1, 10)
    tracker.close("FINISHED")
    _store, run_id = open_store(run, config)
    upload_state.update(run, lambda s: s.stores.clear())  # killed between creating the run and recording its id
    assert sync(run).run_id == run_id
    assert of_mlflow(run, config) == of_journal(run)


def test_the_older_of_two_mlflow_runs_of_one_run_stays(folder):
    run, config = make_run(folder)
    tracker = begin(run, config)
    tracker.close("FINISHED")
    store, run_id = open_store(run, config)
    client = store._client
    experiment = store.read_run(run_id).info.experiment_id
    late = client.create_run(experiment, tags={"pipeline.identity": upload_state.load(run).identity})
    upload_state.update(run, lambda s: s.stores.clear())
    assert sync(run).run_id == run_id
    assert store.read_run(late.info.run_id).info.lifecycle_stage == "deleted"


def test_a_deleted_store_is_filled_again(folder, empty_store):
    run, config = make_run(folder)
    tracker = begin(run, config)
    log_steps(tracker, 1, 10)
    tracker.close("FINISHED")
    shutil.copyfile(empty_store.file, folder / "mlflow.db")
    sync(run)
    assert of_mlflow(run, config) == of_journal(run)


def test_a_kill_during_the_creation_of_a_sqlite_store_leaves_no_partial_store(empty_store):
    from mlflow import MlflowClient

    assert empty_store.file.name not in empty_store.left_by_the_kill and empty_store.left_by_the_kill
    assert MlflowClient(f"sqlite:///{empty_store.file}").get_experiment_by_name("tests")


def test_without_a_store_everything_is_on_disk_and_sync_fills_one_later(folder):
    run, config = make_run(folder, "none")
    tracker = begin(run, config)
    log_steps(tracker, 1, 30)
    tracker.close("FINISHED")
    assert sync(run).uri is None
    done = sync(run, f"sqlite:///{folder}/mlflow.db")
    assert done.status == "FINISHED" and done.points >= 93
    assert of_mlflow(run, config) == of_journal(run)
    assert sync(run, f"sqlite:///{folder}/mlflow.db").points == 0


def test_a_run_whose_process_was_killed_is_killed_after_the_next_sync(folder):
    run, config = make_run(folder)
    tracker = begin(run, config)
    log_steps(tracker, 1, 10)
    assert is_alive(run, EventLog.load(run.events_file))
    assert sync(run).status == "RUNNING"
    tracker._helper.close(30)
    os.close(tracker._alive)  # as the kernel releases the lock of a killed process
    assert not is_alive(run, EventLog.load(run.events_file))
    done = sync(run)
    assert done.status == "KILLED"
    store, run_id = open_store(run, config)
    assert store.read_run(run_id).info.status == "KILLED"
    begin(run, config, 10).close("FINISHED")
    assert store.read_run(run_id).info.status == "FINISHED"


@pytest.mark.timing
def test_an_unreachable_server_delays_nothing(tmp_path):
    run, config = make_run(tmp_path, f"http://127.0.0.1:{free_port()}")
    began = time.monotonic()
    tracker = begin(run, config)
    log_steps(tracker, 1, 30)
    tracker.close("FINISHED")
    assert time.monotonic() - began < 20


def test_an_unreachable_server_causes_one_message_and_no_loss(tmp_path):
    run, config = make_run(tmp_path, f"http://127.0.0.1:{free_port()}")
    tracker = begin(run, config)
    log_steps(tracker, 1, 30)
    tracker.close("FINISHED")
    assert len(of_journal(run)["train/loss"]) == 30
    with pytest.raises(PipelineError, match=r"http://127\.0\.0\.1:\d+: .*\(Connection refused\)"):
        sync(run)


def trained(folder):
    """A run of ten steps that MLflow has; returns it with its config, the open store and the id of its MLflow run."""
    run, config = make_run(folder)
    tracker = begin(run, config)
    log_steps(tracker, 1, 10)
    tracker.close("FINISHED")
    sync(run)
    return run, config, *open_store(run, config)


def test_a_copied_run_folder_gets_an_mlflow_run_of_its_own_that_names_its_origin(folder):
    run, config, store, run_id = trained(folder)
    before = store.read_run(run_id)
    copy = Run(run.path.with_name("copy"))
    shutil.copytree(run.path, copy.path)
    tracker = begin(copy, config, step=10)
    log_steps(tracker, 11, 20)
    tracker.close("FINISHED")
    own = sync(copy).run_id
    assert own is not None and own != run_id and sync(copy).run_id == own
    assert of_mlflow(copy, config) == of_journal(copy)
    assert of_mlflow(run, config) == of_journal(run), "the original received nothing"
    origin = store.read_run(own).data.tags["pipeline.copied_from"]
    assert str(run.path.resolve()) in origin and run_id in origin
    assert "pipeline.copied_from" not in before.data.tags
    assert sync(run).run_id == run_id


@pytest.mark.parametrize("how", ["renamed", "to another file system", "seen at another place"])
def test_a_moved_run_folder_continues_its_mlflow_run(folder, how):
    run, config, store, run_id = trained(folder)
    moved = Run(folder / "elsewhere" / run.name)
    moved.path.parent.mkdir()
    if how == "renamed":
        run.path.rename(moved.path)
    elif how == "seen at another place":
        moved.path.symlink_to(run.path)
    else:  # `mv` copies and deletes there
        shutil.copytree(run.path, moved.path)
        shutil.rmtree(run.path)
    # A copy onto another file system could be another user's: nothing is sent until the store is named by hand.
    assert sync(moved, config.tracking.uri if how == "to another file system" else None).run_id == run_id
    assert "pipeline.copied_from" not in store.read_run(run_id).data.tags
