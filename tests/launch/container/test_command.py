"""The container command: what it binds and passes, and what it refuses before anything is submitted."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest

from pipeline.config.load import load_config
from pipeline.config.sections import Config
from pipeline.errors import UsageError
from pipeline.launch.container.binds import check_visible, create_folders
from pipeline.launch.container.command import container_argv, container_environment
from pipeline.launch.site import SiteContainer
from pipeline.run.folder import Run, run_for
from tests.launch.container.test_image import sif

CONFIG = """
name: tiny
data:
  path: tokens
  sources: [{name: text, paths: ["text/*.txt"]}]
tokenizer: {kind: bytes}
model: {vocab_size: 257, context_length: 16, d_model: 16, num_layers: 1, num_heads: 2, d_ff: 32}
optimizer: {learning_rate: 0.01, min_learning_rate: 0.001, warmup_iters: 2, cosine_cycle_iters: 6}
train: {batch_size: 4, micro_batch_size: 4, max_iters: 6}
container: {image: image.sif}
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder beside the home, on a machine whose /tmp is elsewhere and that has no GPU."""
    (tmp_path / "home").mkdir()
    folder = tmp_path / "work"
    (folder / "text").mkdir(parents=True)
    (folder / "text" / "a.txt").write_text("text")
    sif(folder / "image.sif")
    (folder / "config.yaml").write_text(CONFIG)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pipeline.launch.container.binds._ALWAYS_SEEN", ())
    for driver in ("_NVIDIA_DRIVER", "_AMD_DRIVER"):
        monkeypatch.setattr(f"pipeline.launch.container.command.{driver}", tmp_path / driver)
    return folder


def config(*overrides: str) -> Config:
    return load_config("config.yaml", overrides)


def argv(loaded: Config, site: SiteContainer | None = None, **more: object) -> list[str]:
    given = {"environment": {}, "code": None, **more}
    return container_argv(loaded, site or SiteContainer(), run_for(loaded), ["pipeline", "train", "c.yaml"], **given)  # type: ignore[arg-type]


def bound(command: list[str]) -> list[str]:
    return [command[i + 1] for i, part in enumerate(command) if part == "--bind"]


def variables(command: list[str]) -> dict[str, str]:
    row = next(csv.reader([command[command.index("--env") + 1]]))
    return dict(entry.split("=", 1) for entry in row)


def problems(loaded: Config, site: SiteContainer | None = None) -> list[str]:
    return check_visible(loaded, site or SiteContainer(), run_for(loaded))


def test_the_whole_command_of_a_rank(work):
    command = argv(config(), code=Path("runs/tiny/code"))
    assert command == [
        "apptainer", "exec", "--no-eval", "--no-mount", "home,cwd", "--pid",
        "--bind", str(work),
        "--bind", f"{work}/runs/tiny/code:{work}/runs/tiny/code:ro",
        "--pwd", str(work),
        "--env", command[command.index("--env") + 1],
        f"{work}/image.sif", "pipeline", "train", "c.yaml",
    ]  # fmt: skip
    assert problems(config()) == []


def test_what_the_config_names_outside_the_working_folder_is_bound_and_the_rest_is_not(work, tmp_path):
    for name in ("scratch", "corpus", "vocabulary"):
        (tmp_path / name).mkdir()
    (tmp_path / "vocabulary" / "tokenizer.json").write_text("{}")
    loaded = config(
        f"runs_dir={tmp_path}/scratch/runs", f"data.path={tmp_path}/scratch/tokens",
        f"data.sources.0.paths=[{tmp_path}/corpus/*.txt]",
        "tokenizer.kind=file", f"tokenizer.path={tmp_path}/vocabulary/tokenizer.json",
        f"tracking.uri=sqlite:///{tmp_path}/scratch/mlflow/mlflow.db",
        f"tracking.artifact_location={tmp_path}/scratch/artifacts",
    )  # fmt: skip
    assert problems(loaded) == []
    assert bound(argv(loaded)) == [
        f"{tmp_path}/corpus:{tmp_path}/corpus:ro",
        f"{tmp_path}/vocabulary:{tmp_path}/vocabulary:ro",
        str(work),
        f"{tmp_path}/scratch/artifacts",
        f"{tmp_path}/scratch/mlflow",
        f"{tmp_path}/scratch/tokens",
        f"{tmp_path}/scratch/runs/tiny",
    ]


def test_the_folders_that_are_bound_for_writing_are_made_first(work, tmp_path):
    loaded = config(f"runs_dir={tmp_path}/far/runs", f"data.path={tmp_path}/far/tokens")
    create_folders(loaded, run_for(loaded))
    assert all(Path(bind.split(":")[0]).is_dir() for bind in bound(argv(loaded)))


def test_a_prepared_dataset_that_belongs_to_somebody_else_is_bound_for_reading(work, tmp_path, monkeypatch):
    shared = tmp_path / "shared"
    shared.mkdir()
    loaded = config(f"data.path={shared}")
    access = os.access
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda path, mode: access(path, mode) and (Path(path) != shared or mode != os.W_OK))
        assert problems(loaded) == [f"data.path: {shared} cannot be written; choose another folder"]
        (shared / "manifest.json").write_text("{}")
        assert problems(loaded) == []
        assert f"{shared}:{shared}:ro" in bound(argv(loaded))
    # One's own stays writable: a slice that is done again writes the manifest anew.
    assert str(shared) in bound(argv(loaded))


def test_artifacts_in_an_object_store_are_no_folder(work, tmp_path):
    loaded = config(f"tracking.uri=sqlite:///{tmp_path}/mlflow/mlflow.db", "tracking.artifact_location=s3://bucket/x")
    create_folders(loaded, run_for(loaded))
    assert not (work / "s3:").exists()
    assert problems(loaded) == []
    assert [bind for bind in bound(argv(loaded)) if "s3" in bind] == []


def test_a_home_is_never_bound_as_a_whole(work, tmp_path, monkeypatch):
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
    assert message.startswith(f"tracking.uri: {home} is or holds the home folder") and "folder of its own" in message
    for path in ("mine.txt", f"{tmp_path}/*.txt"):
        (tmp_path / "b.txt").touch()
        [message] = problems(load_config(work / "config.yaml", [f"data.sources.0.paths=[{path}]", "tracking.uri=none"]))
        assert message.startswith("data.sources.0.paths: ") and "the home folder" in message


def test_a_link_is_followed_so_that_it_leads_somewhere_inside(work, tmp_path):
    (tmp_path / "scratch" / "tokens").mkdir(parents=True)
    (work / "tokens").symlink_to(tmp_path / "scratch" / "tokens")
    assert bound(argv(config())) == [str(work), f"{tmp_path}/scratch/tokens"]


def test_a_source_file_that_is_a_link_to_where_nothing_is_bound_is_an_error(work, tmp_path):
    (tmp_path / "corpus").mkdir()
    for name in ("b.txt", "c.txt"):
        (tmp_path / "corpus" / name).write_text("text")
        (work / "text" / name).symlink_to(tmp_path / "corpus" / name)
    [message] = problems(config())
    assert message == (
        f"data.sources.0.paths: text/b.txt is a link to {tmp_path}/corpus/b.txt, which a job in the container does "
        f"not see; add {tmp_path}/corpus to container.binds"
    )
    assert problems(config(f"container.binds=[{tmp_path}/corpus]")) == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("container.binds=[/not/there]", "container.binds: /not/there does not exist"),
        ("container.binds=[/a:b]", "container.binds: given '/a:b', allowed: HOST[:INSIDE[:ro]]"),
        ("container.binds=[/a:/b:rx]", "container.binds: given '/a:/b:rx', allowed: HOST[:INSIDE[:ro]]"),
        ("data.path=/usr/share/tokens", "data.path: /usr/share/tokens would hide a part of the image"),
        ("data.path=/proc/tokens", "data.path: /proc/tokens would hide a part of the image"),
        ("runs_dir='a,b'", "has a comma, colon or backslash in its name"),
    ],
)
def test_what_cannot_be_bound_is_one_clear_error(work, override, message):
    [problem] = problems(config(override))
    assert message in problem


def test_a_snapshot_that_cannot_be_bound_is_an_error_where_the_run_needs_no_bind(work, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.launch.container.binds._ALWAYS_SEEN", (tmp_path / "seen",))
    loaded = [f"runs_dir='{tmp_path}/seen/a,b'", "tracking.uri=none"]
    [problem] = problems(config(*loaded))
    assert problem.startswith(f"runs_dir: {tmp_path}/seen/a,b/tiny/code has a comma, colon or backslash in its name")
    assert problems(config(*loaded, "container.code=image")) == []


def test_binds_of_config_and_site_keep_their_place_and_mode(work, tmp_path):
    (tmp_path / "shared").mkdir()
    loaded = config(f"container.binds=[{tmp_path}/shared:/shared:ro]")
    command = argv(loaded, SiteContainer(binds=(f"{tmp_path}/shared",)))
    assert bound(command)[:2] == [f"{tmp_path}/shared:/shared:ro", f"{tmp_path}/shared"]


def test_variables_survive_whatever_is_in_them(work):
    given = {"LIST": "a,b", "QUOTED": 'say "hi"', "EQUAL": "x=1,y=2", "DOLLAR": "$HOME `id`"}
    found = variables(argv(config(), environment=given))
    assert {name: found[name] for name in given} == given


def test_the_snapshot_comes_first_on_the_path_and_the_image_may_be_asked_for_its_own_code(work):
    code = Path("runs/tiny/code")
    assert variables(argv(config(), code=code))["PYTHONPATH"] == f"{work}/runs/tiny/code"
    command = argv(config("container.code=image"), code=code)
    assert variables(command)["PYTHONPATH"] == "" and f"{work}/runs/tiny/code" not in " ".join(bound(command))
    assert variables(command)["PYTHONSAFEPATH"] == "1"


def test_the_process_inside_is_told_which_image_it_runs_in(work):
    found = variables(argv(config()))
    assert found["PIPELINE_IMAGE"] == f"{work}/image.sif" and len(found["PIPELINE_IMAGE_SHA256"]) == 64


def test_caches_go_where_the_site_has_room(work, tmp_path):
    (tmp_path / "scratch").mkdir()
    command = argv(config(), scratch=tmp_path / "scratch")
    assert str(tmp_path / "scratch") in bound(command)
    for name in ("XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "MPLCONFIGDIR"):
        assert variables(command)[name].startswith(f"{tmp_path}/scratch/")


@pytest.mark.parametrize(
    ("gpu", "driver", "option"),
    [
        ("auto", None, None), ("auto", "_NVIDIA_DRIVER", "--nv"), ("auto", "_AMD_DRIVER", "--rocm"),
        ("nv", None, "--nv"), ("rocm", None, "--rocm"), ("none", "_NVIDIA_DRIVER", None),
    ],
)  # fmt: skip
def test_devices_go_by_what_the_node_has_or_the_site_says(work, tmp_path, gpu, driver, option):
    if driver:
        (tmp_path / driver).touch()
    command = argv(config(), SiteContainer(gpu=gpu))
    assert [part for part in command if part in ("--nv", "--rocm")] == ([option] if option else [])


def test_what_the_site_says_about_apptainer(work):
    site = SiteContainer(command="/opt/singularity/bin/singularity", pid=False, unsquash=True, options=("--userns",))
    command = argv(config(), site)
    assert command[0] == "/opt/singularity/bin/singularity"
    assert "--pid" not in command and "--unsquash" in command
    assert command[command.index(f"{work}/image.sif") - 1] == "--userns"


def test_a_clean_environment_still_passes_what_a_job_lives_on_and_keeps_secrets_off_the_command_line(work):
    loaded = config("container.environment=clean")
    around = {
        "SLURM_JOB_ID": "7", "MASTER_ADDR": "n1", "MLFLOW_TRACKING_PASSWORD": "secret", "NCCL_DEBUG": "INFO",
        "SLURMD_NODENAME": "n1", "RANK": "1", "CUDA_VISIBLE_DEVICES": "0,1", "EDITOR": "vi",
    }  # fmt: skip
    command, passed = argv(loaded), container_environment(SiteContainer(), around)
    assert "--cleanenv" in command and "secret" not in " ".join(command)
    for name, value in around.items():
        assert passed.get(f"APPTAINERENV_{name}") == (None if name == "EDITOR" else value)
    singularity = container_environment(SiteContainer(command="/usr/bin/singularity"), around)
    assert singularity["SINGULARITYENV_RANK"] == "1"
    assert "--cleanenv" not in argv(config())


def test_without_an_image_there_is_no_command(work):
    with pytest.raises(UsageError, match=r"container\.image: is not set; build one with `pipeline image build`"):
        container_argv(config("container.image=null"), SiteContainer(), Run(Path("r")), [], environment={}, code=None)
