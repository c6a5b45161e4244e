"""The command that starts one process of a job inside the image, with every option of Apptainer."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from pipeline.config.sections import Config
from pipeline.launch.container.binds import absolute, binds, working_folder
from pipeline.launch.container.caches import cache_variables
from pipeline.launch.container.image import image_identity, image_path, start_options
from pipeline.launch.site import SiteContainer
from pipeline.run.evaluations import data_cache
from pipeline.run.folder import Run

# What a job needs from its surroundings even in a clean environment: Slurm's variables, where the ranks meet, which
# devices each one has, and how tracking, PyTorch and communication (over UCX or libfabric) are set up.
_PASSED_PREFIXES = ("SLURM_", "SLURMD_", "MASTER_", "MLFLOW_", "NCCL_", "TORCH_NCCL_", "GLOO_", "UCX_", "FI_",
                    "PYTORCH_", "PIPELINE_")  # fmt: skip
_PASSED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES",
           "HIP_VISIBLE_DEVICES")  # fmt: skip

_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
_AMD_DRIVER = Path("/dev/kfd")


def container_argv(
    config: Config,
    site: SiteContainer,
    run: Run,
    inner: Sequence[str],
    *,
    environment: Mapping[str, str],
    code: Path | None,
    scratch: Path | None = None,
    elsewhere: Collection[str] = (),
) -> list[str]:
    """Returns the exact command of one process, on the machine that will run it.

    Args:
        config: The experiment; paths in it are relative to the working folder of this process.
        site: How Apptainer is run here.
        run: The run folder.
        inner: The command inside, for example `pipeline train CONFIG`.
        environment: Variables to set inside. Everyone who can list processes sees them: secrets go through the
            environment of the command instead (`container_environment`).
        code: The snapshot of the submitted code; used if `container.code` is `snapshot`.
        scratch: Where compilers keep their caches; /tmp if None.
        elsewhere: Names of variables that the environment of the command sets, even where they are the launcher's.

    Raises:
        UsageError: The config names no image.
        PipelineError: The image cannot be read.
    """
    image = image_path(config)
    code = code if config.container.code == "snapshot" else None
    found = binds(config, site, run, code, scratch)
    option = gpu_option(site.gpu)
    variables = {
        # Settings of the host's Python and loader point at files that do not exist inside.
        "LD_PRELOAD": "",
        "PYTHONHOME": "",
        "PYTHONPATH": str(absolute(code)) if code is not None else "",
        # Otherwise `python -m` in a checkout would run the checkout's code, whatever container.code says.
        "PYTHONSAFEPATH": "1",
        **cache_variables(scratch),
        # The data of tasks was fetched before, and not into the scratch folder of a node.
        **({"HF_HOME": str(absolute(data_cache()))} if config.evaluate.tasks else {}),
        **image_identity(image).variables(),
        **environment,
    }
    variables = {name: value for name, value in variables.items() if name not in elsewhere}
    return [
        *(site.command, "exec", *start_options(image, site)),
        *([option] if option else []),
        *(["--cleanenv"] if config.container.environment == "clean" else []),
        *(part for bind in found for part in ("--bind", bind.option())),
        *("--pwd", str(working_folder(found, run))),
        *("--env", _joined(variables)),
        *site.options,
        str(image),
        *inner,
    ]


def container_environment(
    site: SiteContainer, environment: Mapping[str, str], own: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Returns the environment to start the command with, made from that of the job.

    Variables of Slurm, the ranks and tracking are passed with Apptainer's prefix: otherwise a clean environment would
    drop them, and the defaults of the image would override them.

    Args:
        site: How Apptainer is run here.
        environment: The environment of the job.
        own: Variables of the site, which may be secrets: they are added, and passed in the same way.
    """
    own = own or {}
    environment = {**own, **environment}
    prefix = "SINGULARITYENV_" if Path(site.command).name == "singularity" else "APPTAINERENV_"
    passed = {
        f"{prefix}{k}": v for k, v in environment.items() if k.startswith(_PASSED_PREFIXES) or k in _PASSED or k in own
    }
    return {**environment, **passed}


def gpu_option(kind: str) -> str | None:
    """Returns Apptainer's option for the GPUs of this machine, by a site's `container.gpu`; None without GPUs."""
    if kind == "auto":
        kind = "nv" if _NVIDIA_DRIVER.exists() else "rocm" if _AMD_DRIVER.exists() else "none"
    return None if kind == "none" else f"--{kind}"


def _joined(variables: Mapping[str, str]) -> str:
    """Returns the argument of `--env`: one line of CSV, the only form in which commas and quotes survive."""
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(f"{name}={value}" for name, value in variables.items())
    return line.getvalue()
