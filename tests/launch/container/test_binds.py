"""The folders a job sees in its container, and those that are refused before anything is submitted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.config.load import load_config
from pipeline.data.manifest import MANIFEST
from pipeline.errors import UsageError
from pipeline.launch.container.binds import create_folders, temporary_folders
from pipeline.launch.site import SiteContainer
from pipeline.run.folder import run_for
from tests.launch.container.support import argv, bound, config, problems


def test_only_paths_that_the_config_names_are_bound_besides_the_working_folder(work, tmp_path):
    for name in ("scratch", "corpus", "adopted", "vocabulary"):
        (tmp_path / name).mkdir()
    (tmp_path / "vocabulary" / "tokenizer.json").write_text("{}")
    loaded = config(
        f"runs_dir={tmp_path}/scratch/runs", f"data.path={tmp_path}/scratch/tokens",
        f"data.sources.0.paths=[{tmp_path}/corpus/*.txt]", f"data.token_folder={tmp_path}/adopted",
        "tokenizer.kind=file", f"tokenizer.path={tmp_path}/vocabulary/tokenizer.json",
        f"tracking.uri=sqlite:///{tmp_path}/scratch/mlflow/mlflow.db",
        f"tracking.artifact_location={tmp_path}/scratch/artifacts",
    )  # fmt: skip
    assert problems(loaded) == []
    assert bound(argv(loaded)) == [
        f"{tmp_path}/adopted:{tmp_path}/adopted:ro",
        f"{tmp_path}/corpus:{tmp_path}/corpus:ro",
        f"{tmp_path}/vocabulary:{tmp_path}/vocabulary:ro",
        str(work),
        f"{tmp_path}/scratch/artifacts",
        f"{tmp_path}/scratch/mlflow",
        f"{tmp_path}/scratch/tokens",
        f"{tmp_path}/scratch/runs/tiny",
    ]


def test_folders_that_are_bound_for_writing_are_created_first(work, tmp_path):
    loaded = config(f"runs_dir={tmp_path}/far/runs", f"data.path={tmp_path}/far/tokens")
    create_folders(loaded, run_for(loaded))
    assert all(Path(bind.split(":")[0]).is_dir() for bind in bound(argv(loaded)))


def test_a_finished_dataset_of_another_user_is_bound_read_only(work, tmp_path, monkeypatch):
    shared = tmp_path / "shared"
    shared.mkdir()
    loaded = config(f"data.path={shared}")
    access = os.access
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda path, mode: access(path, mode) and (Path(path) != shared or mode != os.W_OK))
        assert [p.partition(";")[0] for p in problems(loaded)] == [f"data.path: {shared} cannot be written"]
        (shared / MANIFEST).write_text("{}")
        assert problems(loaded) == []
        assert f"{shared}:{shared}:ro" in bound(argv(loaded))
    # A user's own dataset stays writable: preparing a slice again rewrites its manifest.
    assert str(shared) in bound(argv(loaded))


def test_a_run_that_is_branched_from_is_bound_so_that_it_can_be_pinned(work, tmp_path, monkeypatch):
    base, checkpoint = tmp_path / "base", tmp_path / "base" / "checkpoints" / "step_00000004"
    checkpoint.mkdir(parents=True)
    assert str(base) in bound(argv(config(f"init.from={base}")))
    (checkpoint / "manifest.json").write_text("{}")
    assert str(checkpoint.parent) in bound(argv(config(f"init.from={checkpoint}")))
    assert f"{base}:{base}:ro" in bound(argv(config(f"init.from=hf:{base}")))
    access = os.access
    monkeypatch.setattr("os.access", lambda path, mode: access(path, mode) and (Path(path) != base or mode != os.W_OK))
    loaded = config(f"init.from={base}")
    assert problems(loaded) == [] and f"{base}:{base}:ro" in bound(argv(loaded))


def test_an_origin_that_is_gone_is_not_bound(work, tmp_path):
    """A run that has saved needs it no more."""
    loaded = config(f"init.from={tmp_path}/nowhere")
    assert problems(loaded) == [] and not any("nowhere" in bind for bind in bound(argv(loaded)))


def test_the_address_of_an_object_store_is_no_folder(work, tmp_path):
    loaded = config(f"tracking.uri=sqlite:///{tmp_path}/mlflow/mlflow.db", "tracking.artifact_location=s3://bucket/x")
    create_folders(loaded, run_for(loaded))
    assert not (work / "s3:").exists()
    assert problems(loaded) == []
    assert [bind for bind in bound(argv(loaded)) if "s3" in bind] == []


def test_the_home_folder_is_never_bound_as_a_whole(work, tmp_path, monkeypatch):
    home = tmp_path / "home"
    (home / "runs").mkdir()
    (home / "mine.txt").write_text("text")
    monkeypatch.chdir(home)
    loaded = load_config(work / "config.yaml", [f"container.image={work}/image.sif", "tracking.uri=none"])
    command = argv(loaded)
    assert str(home) not in bound(command)
    assert bound(command) == [f"{home}/tokens", f"{home}/runs/tiny"]
    assert command[command.index("--pwd") + 1] == str(home)

    [message] = problems(load_config(work / "config.yaml", [f"container.image={work}/image.sif"]))
    assert message.startswith(f"tracking.uri: {home} ") and "home folder" in message
    for path in ("mine.txt", f"{tmp_path}/*.txt"):
        (tmp_path / "b.txt").touch()
        [message] = problems(load_config(work / "config.yaml", [f"data.sources.0.paths=[{path}]", "tracking.uri=none"]))
        assert message.startswith("data.sources.0.paths: ") and "the home folder" in message


def test_the_target_of_a_link_is_bound_too(work, tmp_path):
    (tmp_path / "scratch" / "tokens").mkdir(parents=True)
    (work / "tokens").symlink_to(tmp_path / "scratch" / "tokens")
    assert bound(argv(config())) == [str(work), f"{tmp_path}/scratch/tokens"]


def test_a_source_file_that_would_be_a_dangling_link_inside_is_an_error(work, tmp_path):
    (tmp_path / "corpus").mkdir()
    for name in ("b.txt", "c.txt"):
        (tmp_path / "corpus" / name).write_text("text")
        (work / "text" / name).symlink_to(tmp_path / "corpus" / name)
    [message] = problems(config())
    assert message.startswith("data.sources.0.paths: text/b.txt ") and f"{tmp_path}/corpus/b.txt" in message
    assert message.endswith(f"add {tmp_path}/corpus to container.binds")
    assert problems(config(f"container.binds=[{tmp_path}/corpus]")) == []


@pytest.mark.parametrize(
    ("override", "place", "word"),
    [
        ("container.binds=[/not/there]", "container.binds: /not/there", "does not exist"),
        ("container.binds=[/a:b]", "container.binds: given '/a:b'", "HOST[:INSIDE[:ro]]"),
        ("container.binds=[/a:/b:rx]", "container.binds: given '/a:/b:rx'", "HOST[:INSIDE[:ro]]"),
        ("container.binds=[/a:/b:ro:ro]", "container.binds: given '/a:/b:ro:ro'", "HOST[:INSIDE[:ro]]"),
        ("container.binds=[':/b']", "container.binds: given ':/b'", "HOST[:INSIDE[:ro]]"),
        ("data.path=/usr/share/tokens", "data.path: /usr/share/tokens", "hide"),
        ("data.path=/proc/tokens", "data.path: /proc/tokens", "hide"),
        ("runs_dir='a,b'", "runs_dir: ", "comma, colon or backslash"),
    ],
)
def test_a_path_that_cannot_be_bound_is_one_clear_error(work, override, place, word):
    [problem] = problems(config(override))
    assert problem.startswith(place) and word in problem


def test_a_snapshot_that_cannot_be_bound_is_an_error_where_the_run_needs_no_bind(work, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.launch.container.binds._ALWAYS_VISIBLE", (tmp_path / "seen",))
    loaded = [f"runs_dir='{tmp_path}/seen/a,b'", "tracking.uri=none"]
    [problem] = problems(config(*loaded))
    assert problem.startswith(f"runs_dir: {tmp_path}/seen/a,b/tiny/code ") and "comma" in problem
    assert problems(config(*loaded, "container.code=image")) == []


def test_binds_of_config_and_site_keep_their_place_and_mode(work, tmp_path):
    (tmp_path / "shared").mkdir()
    loaded = config(f"container.binds=[{tmp_path}/shared:/shared:ro]")
    command = argv(loaded, SiteContainer(binds=(f"{tmp_path}/shared",)))
    assert bound(command)[:2] == [f"{tmp_path}/shared:/shared:ro", f"{tmp_path}/shared"]


def test_a_folder_that_cannot_be_created_names_the_config_key(work, tmp_path):
    (tmp_path / "file").touch()
    loaded = config(f"runs_dir={tmp_path}/file/runs")
    with pytest.raises(UsageError, match=f"runs_dir: {tmp_path}/file/runs/tiny .*Not a directory"):
        create_folders(loaded, run_for(loaded))


def test_temporary_folders_are_removed_unless_something_was_written_to_them(work):
    loaded = config()
    with temporary_folders(loaded, run_for(loaded)):
        assert (work / "runs" / "tiny").is_dir() and (work / "tokens").is_dir()
        (work / "tokens" / "kept").touch()
    assert not (work / "runs").exists()
    assert (work / "tokens" / "kept").exists()


def test_the_data_of_tasks_and_a_folder_of_tasks_are_bound_and_named(work, tmp_path, monkeypatch):
    for name in ("cache", "tasks"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    command = argv(config("evaluate.tasks=[mine]", f"evaluate.include_path={tmp_path}/tasks"))
    assert {f"{tmp_path}/cache", f"{tmp_path}/tasks:{tmp_path}/tasks:ro"} <= set(bound(command))
    assert f"HF_HOME={tmp_path}/cache" in command[command.index("--env") + 1].split(",")
    assert "HF_HOME" not in " ".join(argv(config()))
