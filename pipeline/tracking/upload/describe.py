"""Describes a run for MLflow besides its metrics: params, tags, dataset and files."""

from __future__ import annotations

import getpass
import json
import re
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.config.sections import Config
from pipeline.data.layout import MANIFEST
from pipeline.files import is_regular, read_json, sha256_file, write_text
from pipeline.run.evaluations import evaluation_files, evaluations, suffix
from pipeline.run.events import Cancelled, Checkpointed, EventLog, GaveUp, Repeated, StartBegan, Submitted
from pipeline.run.folder import CHECKPOINT_MANIFEST, Run, step_name
from pipeline.tracking.upload.store import RunStatus
from pipeline.tracking.upload_state import State

# Facts of a start's provenance, by the tags that show them.
_FACTS = {
    "git.commit": "mlflow.source.git.commit",
    "git.dirty": "pipeline.dirty",
    "pipeline": "pipeline.version",
    "host": "pipeline.host",
    "slurm_job_id": "pipeline.slurm_job_id",
    "image.sha256": "pipeline.image",
    "dataset": "pipeline.dataset",
    "init.digest": "pipeline.init",
}


def params(config: Config) -> dict[str, str]:
    """Returns the resolved config as dotted names and text values."""
    return {name: as_text(value) for name, value in flatten(config.model_dump(mode="json"))}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the dotted names and leaves of nested mappings; a list is a leaf."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def as_text(value: Any) -> str:
    """Returns a text as it is and anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def tags(run: Run) -> dict[str, str]:
    """Returns what runs are filtered by: of the newest start, of the newest checkpoint, and the parent of a branch.

    The whole provenance is an artifact; as tags it would fill the page of the run.
    """
    found = {"pipeline.run_folder": str(run.path.resolve()), "mlflow.user": _user(), "mlflow.source.name": "pipeline"}
    starts = run.provenance()
    if starts:
        newest = starts[-1]
        found["pipeline.starts"] = str(len(starts))
        found["mlflow.source.type"] = "JOB" if newest.get("slurm_job_id") else "LOCAL"
        facts = dict(flatten(newest))
        found |= {tag: as_text(facts[name]) for name, tag in _FACTS.items() if facts.get(name) is not None}
    return found | checkpoint_tags(run) | _parent_tags(run)


def _parent_tags(run: Run) -> dict[str, str]:
    """Returns the checkpoint that the run branched from; MLflow's page shows the run below that checkpoint's."""
    origin = run.origin()
    if origin is None or "step" not in origin:
        return {}
    tags = {"": origin["from"], ".step": str(origin["step"]), ".digest": origin["digest"]}
    parent = origin.get("mlflow_run_id")
    above = {} if parent is None else {"mlflow.parentRunId": parent}
    return {f"pipeline.parent{name}": value for name, value in tags.items()} | above


def checkpoint_tags(run: Run, step: int | None = None) -> dict[str, str]:
    """Returns path, step and digest of a step's checkpoint (None: the newest); empty without one."""
    made = [c for c in checkpoints(run) if step is None or c["step"] == step]
    if not made:
        return {}
    about = {"": made[-1]["path"], ".step": made[-1]["step"], ".digest": made[-1]["digest"]}
    return {f"pipeline.checkpoint{name}": str(value) for name, value in about.items() if value is not None}


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run under a user id without a name
        return "unknown"


def checkpoints(run: Run) -> list[dict[str, Any]]:
    """Returns every published checkpoint, oldest first: step, Unix time, path, and the digest of its manifest."""
    by_step: dict[int, dict[str, Any]] = {}
    for event in EventLog.load(run.events_file).of(Checkpointed):
        folder = run.checkpoints / step_name(event.step)
        manifest = folder / CHECKPOINT_MANIFEST
        digest = event.digest or (sha256_file(manifest, folder) if is_regular(manifest, folder) else None)
        path = event.path or str(folder)
        by_step[event.step] = {"step": event.step, "time": event.time, "path": path, "digest": digest}
    return [by_step[step] for step in sorted(by_step)]


def evaluation(run: Run) -> dict[str, Any] | None:
    """Returns the result of the last `pipeline evaluate` as a line of metrics, at the time of the checkpoint.

    Evaluating a checkpoint again gives the same numbers and time, so no second point.
    """
    found = run.evaluation()
    if found is None:
        return None
    made = next((c["time"] for c in checkpoints(run) if c["step"] == found["step"]), None)
    figures = {"loss": found["loss"], "perplexity": found["perplexity"], "bits_per_byte": found["bits_per_byte"]}
    values = {f"evaluation/{name}": value for name, value in figures.items()}
    for name, source in found.get("sources", {}).items():
        values |= {f"evaluation/{name}/{key}": source[key] for key in ("loss", "bits_per_byte")}
    return {"step": found["step"], "time": made or run.evaluation_file.stat().st_mtime, **values}


def task_evaluations(run: Run) -> Iterator[dict[str, Any]]:
    """Yields the scores on tasks as lines of metrics, each at the time of its checkpoint; see `evaluation`."""
    made = {c["step"]: c["time"] for c in checkpoints(run)}
    for found in evaluations(run):
        asked = suffix(found["num_fewshot"], found["limit"])
        values: dict[str, Any] = {}
        for task, scores in {**found["groups"], **found["tasks"]}.items():
            for metric, value in scores["metrics"].items():
                values[f"tasks/{task}{asked}/{metric}"] = value["value"]
                values[f"tasks/{task}{asked}/{metric}_stderr"] = value["stderr"]
        known = {key: value for key, value in values.items() if value is not None}
        yield {"step": found["step"], "time": made.get(found["step"], found["time"]), **known}


def status(run: Run, s: State) -> RunStatus:
    """Returns the status for MLflow: a run that a scheduler will restart is RUNNING, unless given up."""
    if s.status != "STOPPED":
        return s.status
    match EventLog.load(run.events_file).last(StartBegan, Submitted, Repeated, Cancelled, GaveUp):
        case Cancelled():
            return "KILLED"
        case GaveUp():
            return "FAILED"
    return "RUNNING"


def files(run: Run) -> Iterator[tuple[Path, str | None]]:
    """Yields the files that become artifacts, each with its artifact folder."""
    for file in (
        run.config_file,
        run.provenance_file,
        run.tokenizer_file,
        run.environment_file,
        run.checkpoint_list,
        run.evaluation_file,
        run.events_file,
        run.report_file,
    ):
        if is_regular(file, run.path):  # what a link names would be published
            yield file, None
    for file in evaluation_files(run):
        if is_regular(file, run.path):
            yield file, f"{run.evaluations.name}/{file.parent.name}"
    if run.samples.is_dir():
        for file in sorted(run.samples.iterdir()):
            if is_regular(file, run.path) and not file.name.startswith("."):
                yield file, "samples"


def dataset(config: Config, given: Mapping[str, Any]) -> tuple[str, str, str, str] | None:
    """Returns name, digest, source and profile of the data; None where nothing is known yet."""
    about = dict(given)
    manifest = Path(config.data.path) / MANIFEST
    if not about and manifest.is_file():
        tree = read_json(manifest, manifest.parent)
        about = {k: v for k, v in tree.items() if not isinstance(v, (list, dict))} if isinstance(tree, dict) else {}
    if not about:
        return None
    digest = str(about.get("digest") or "unknown")
    source = json.dumps({"uri": str(Path(config.data.path).resolve())})
    return Path(config.data.path).name, digest, source, json.dumps(about, default=str, ensure_ascii=False)


def write_environment(run: Run) -> None:
    """Lists the installed packages, but no environment variables, which may hold secrets."""
    heads = (d.read_text("METADATA") or d.read_text("PKG-INFO") or "" for d in metadata.distributions())
    lines = sorted(filter(None, set(map(_pinned, heads))))
    write_text(run.environment_file, "\n".join(lines) + "\n")


def _pinned(about: str) -> str | None:
    """Returns `name==version` by a package's metadata, of which `importlib.metadata` would parse the README too."""
    head = re.split(r"\r?\n\r?\n", about, maxsplit=1)[0]
    found = dict(re.findall(r"^(Name|Version): *(\S+)", head, re.MULTILINE))
    return f"{found['Name']}=={found['Version']}" if len(found) == 2 else None
