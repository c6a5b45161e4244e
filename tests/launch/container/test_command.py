"""The container command of a rank: its options, its variables, and the environment it is started with."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from pipeline.errors import UsageError
from pipeline.launch.container.command import container_argv, container_environment
from pipeline.launch.site import SiteContainer
from pipeline.run.folder import Run
from tests.launch.container.support import argv, bound, config, problems


def variables(command: list[str]) -> dict[str, str]:
    row = next(csv.reader([command[command.index("--env") + 1]]))
    return dict(entry.split("=", 1) for entry in row)


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


def test_variables_survive_commas_and_quotes(work):
    given = {"LIST": "a,b", "QUOTED": 'say "hi"', "EQUAL": "x=1,y=2", "DOLLAR": "$HOME `id`"}
    found = variables(argv(config(), environment=given))
    assert {name: found[name] for name in given} == given


def test_a_job_imports_the_snapshot_unless_the_config_asks_for_the_code_of_the_image(work):
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
    for name in ("XDG_CACHE_HOME", "MPLCONFIGDIR"):
        assert variables(command)[name].startswith(f"{tmp_path}/scratch/")


@pytest.mark.parametrize(
    ("gpu", "driver", "option"),
    [
        ("auto", None, None), ("auto", "_NVIDIA_DRIVER", "--nv"), ("auto", "_AMD_DRIVER", "--rocm"),
        ("nv", None, "--nv"), ("rocm", None, "--rocm"), ("none", "_NVIDIA_DRIVER", None),
    ],
)  # fmt: skip
def test_gpus_are_those_of_the_node_unless_the_site_names_a_kind(work, tmp_path, gpu, driver, option):
    if driver:
        (tmp_path / driver).touch()
    command = argv(config(), SiteContainer(gpu=gpu))
    assert [part for part in command if part in ("--nv", "--rocm")] == ([option] if option else [])


def test_the_site_sets_command_and_options_of_apptainer(work):
    site = SiteContainer(command="/opt/singularity/bin/singularity", pid=False, unsquash=True, options=("--userns",))
    command = argv(config(), site)
    assert command[0] == "/opt/singularity/bin/singularity"
    assert "--pid" not in command and "--unsquash" in command
    assert command[command.index(f"{work}/image.sif") - 1] == "--userns"


def test_a_clean_environment_still_passes_what_a_job_needs_and_keeps_secrets_off_the_command_line(work):
    loaded = config("container.environment=clean")
    around = {
        "SLURM_JOB_ID": "7", "MASTER_ADDR": "n1", "MLFLOW_TRACKING_PASSWORD": "secret", "NCCL_DEBUG": "INFO",
        "SLURMD_NODENAME": "n1", "RANK": "1", "CUDA_VISIBLE_DEVICES": "0,1", "EDITOR": "vi",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1", "PYTORCH_CUDA_ALLOC_CONF": "backend:native", "FI_PROVIDER": "cxi",
        "UCX_NET_DEVICES": "mlx5_0:1",
    }  # fmt: skip
    command, passed = argv(loaded), container_environment(SiteContainer(), around)
    assert "--cleanenv" in command and "secret" not in " ".join(command)
    for name, value in around.items():
        assert passed.get(f"APPTAINERENV_{name}") == (None if name == "EDITOR" else value)
    singularity = container_environment(SiteContainer(command="/usr/bin/singularity"), around)
    assert singularity["SINGULARITYENV_RANK"] == "1"
    assert "--cleanenv" not in argv(config())


def test_without_an_image_there_is_no_command(work):
    with pytest.raises(UsageError, match=r"container\.image: not set"):
        container_argv(config("container.image=null"), SiteContainer(), Run(Path("r")), [], environment={}, code=None)
