"""Read-only run folders, damaged states, and the messages of commands where sending fails."""

import errno
import os

import pytest

from pipeline.errors import PipelineError
from pipeline.launch.watch.status import statuses
from pipeline.run.events import EventLog
from pipeline.tracking import upload_state
from pipeline.tracking.upload.sync import is_alive, sync, sync_quietly
from tests.processes import free_port
from tests.tracking.support import begin, make_run


@pytest.fixture
def read_only(monkeypatch):
    """Mounts a folder read-only (permissions do not stop root, which may run this)."""
    really_open = os.open

    def make(folder):
        def guarded(path, flags, *args, **more):
            if str(path).startswith(str(folder)) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            return really_open(path, flags, *args, **more)

        monkeypatch.setattr(os, "open", guarded)

    return make


def test_a_read_only_run_can_be_inspected(tmp_path, read_only):
    run, config = make_run(tmp_path, "none")
    tracker = begin(run, config)
    (tmp_path / "closed").mkdir()
    closed, config = make_run(tmp_path / "closed", "none")
    begin(closed, config).close("FINISHED")
    read_only(tmp_path)
    assert is_alive(run, EventLog.load(run.events_file)) and not is_alive(closed, EventLog.load(closed.events_file))
    assert len(statuses([run, closed])) == 2
    os.close(tracker._alive)


def test_syncing_a_read_only_run_names_the_folder_and_the_cure(folder, read_only, capsys):
    run, config = make_run(folder)
    begin(run, config).close("FINISHED")
    read_only(run.path)
    with pytest.raises(PipelineError) as refused:
        sync(run)
    sync_quietly(run)
    for message in (str(refused.value), capsys.readouterr().err):
        assert f"{run.path}: " in message and "(Read-only file system)" in message and "write access" in message


def test_a_command_succeeds_where_mlflow_is_unreachable(tmp_path, capsys):
    run, config = make_run(tmp_path, "none")
    begin(run, config).close("FINISHED")
    sync_quietly(run)
    assert capsys.readouterr().err == ""
    upload_state.update(run, lambda s: setattr(s, "store", f"http://127.0.0.1:{free_port()}"))
    sync_quietly(run)
    assert "(Connection refused)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [("[]", "the whole should be"), ("{}", "identity is missing"), ('{"identity": 5}', "identity should be text")],
)
def test_a_damaged_state_is_named_with_its_cure(tmp_path, content, said):
    run, _ = make_run(tmp_path, "none")
    run.mlflow_file.write_text(content)
    with pytest.raises(PipelineError) as refused:
        sync(run)
    assert str(run.mlflow_file) in str(refused.value) and said in str(refused.value)
    assert "or remove it" in str(refused.value)
    run.mlflow_file.unlink()
    sync(run)
