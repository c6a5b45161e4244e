"""The command that starts one process of a job inside the image: everything Apptainer is told, in one place."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.config.sections import Config
from pipeline.launch.container.binds import absolute, binds, working_folder
from pipeline.launch.container.image import image_identity, image_path, start_options
from pipeline.launch.site import SiteContainer
from pipeline.run.folder import Run

# What a job is told by its surroundings, in a clean environment too: Slurm's word, where the ranks meet,
# which devices are theirs, and how tracking and communication are set up.
_PASSED_PREFIXES = ("SLURM_", "SLURMD_", "MASTER_", "MLFLOW_", "NCCL_", "GLOO_", "PIPELINE_")
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
) -> list[str]:
    """The exact command of one process, on the machine that will run it.

    Args:
        config: The experiment; relative paths in it mean the working folder of this process.
        site: How Apptainer is run here.
        run: The run folder.
        inner: The command inside, `pipeline train CONFIG` say.
        environment: Variables to set inside. They are seen by everyone who can list processes: secrets are
            passed by the environment of the command instead (`container_environment`).
        code: The snapshot of the submitted code; used with `container.code: snapshot`.
        scratch: Where compilers may keep their caches; /tmp without it.

    Raises:
        UsageError: The config names no image.
        PipelineError: The image cannot be read.
    """
    image = image_path(config)
    code = code if config.container.code == "snapshot" else None
    found = binds(config, site, run, code, scratch)
    option = gpu_option(site.gpu)
    variables = {
        # Of the host's Python and loader; none of it exists inside.
        "LD_PRELOAD": "",
        "PYTHONHOME": "",
        "PYTHONPATH": str(absolute(code)) if code is not None else "",
        # Without it `python -m` in a checkout would run the checkout's code, whatever container.code says.
        "PYTHONSAFEPATH": "1",
        **_caches(scratch or Path("/tmp")),
        **image_identity(image).variables(),
        **environment,
    }
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


def container_environment(site: SiteContainer, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment to start the command with, made from that of the job.

    What a job is told by its surroundings is handed over by Apptainer's own prefix: a clean environment would cut it
    off, and the defaults of the image would win over it.
    """
    prefix = "SINGULARITYENV_" if Path(site.command).name == "singularity" else "APPTAINERENV_"
    passed = {f"{prefix}{k}": v for k, v in environment.items() if k.startswith(_PASSED_PREFIXES) or k in _PASSED}
    return {**environment, **passed}


def gpu_option(kind: str) -> str | None:
    """Apptainer's option for the GPUs of this machine, by a site's `container.gpu`; None for none."""
    if kind == "auto":
        kind = "nv" if _NVIDIA_DRIVER.exists() else "rocm" if _AMD_DRIVER.exists() else "none"
    return None if kind == "none" else f"--{kind}"


def _caches(folder: Path) -> dict[str, str]:
    # The home is not there inside, and the image cannot be written.
    cache = folder / f"pipeline-cache-{os.getuid()}"
    return {
        "XDG_CACHE_HOME": str(cache),
        "MPLCONFIGDIR": str(cache / "matplotlib"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
    }


def _joined(variables: Mapping[str, str]) -> str:
    """As one `--env` takes them: a line of CSV, which is the only form that a comma or a quote survives."""
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(f"{name}={value}" for name, value in variables.items())
    return line.getvalue()
