"""Talks to an MLflow store. Every call may block or fail, so nothing here runs in the training process.

Importing this module is cheap; opening a store imports mlflow.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline.config.sections import tracking_uri_problem
from pipeline.errors import UsageError
from pipeline.files import fsync_dir, fsync_file
from pipeline.tracking.upload.errors import RunDeleted, is_missing, is_refusal
from pipeline.tracking.upload_state import file_lock

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun

MAX_POINTS = 1000  # per log_batch: MLflow's limit
_MAX_PARAMS = 100
_MAX_PARAM_LENGTH = 6000
_MAX_TAG_LENGTH = 8000
_IDENTITY = "pipeline.identity"
_EXPERIMENT = {"mlflow.experimentKind": "custom_model_development"}  # MLflow's page shows training runs first

RunStatus = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class Point:
    """One value of one metric; `time_ms` is Unix time in milliseconds."""

    key: str
    value: float
    time_ms: int
    step: int


def resolve_uri(uri: str) -> str:
    """Returns the address with a sqlite path made absolute, so that it holds in every working folder.

    Raises:
        UsageError: It has none of the allowed forms.
    """
    problem = tracking_uri_problem(uri)
    if problem is not None:
        raise UsageError(f"tracking.uri {problem}")
    if uri.startswith("sqlite:///"):
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).resolve()}"
    return uri.rstrip("/")


def quiet_environment() -> None:
    """Sets MLflow's environment variables that the user has not set: no telemetry, no retries.

    MLflow's 7 retries with growing pauses would block a call to a dead server for four minutes; the uploader retries
    itself. The timeout stays long, because training does not wait for a slow server.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "120")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")


def _make_tables(file: Path) -> None:
    """Publishes a new sqlite store with all its tables: MLflow never completes one that a kill left with half."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    temp = file.with_name(f".{file.name}.tmp")
    temp.unlink(missing_ok=True)  # left by a killed process; under the lock no other process uses it
    maker = SqlAlchemyStore(f"sqlite:///{temp}", file.parent.as_uri())
    maker.engine.dispose()
    fsync_file(temp)
    temp.replace(file)
    fsync_dir(file.parent)


def _folder_name(experiment: str) -> str:
    """Returns the name of the one folder that holds an experiment's artifacts, whatever its own name is."""
    name = experiment.replace("/", "%2F")
    return name.replace(".", "%2E") if name in (".", "..") else name


class Store:
    """An open tracking store; opening one may create a sqlite file.

    Args:
        uri: A resolved address, `sqlite:////...` or `http(s)://...`.
        experiment: Name of the experiment; created if missing.
        artifact_location: Folder for the artifacts of a sqlite store; a server has its own.
    """

    def __init__(self, uri: str, experiment: str, artifact_location: str) -> None:
        quiet_environment()
        from mlflow import MlflowClient

        for noisy in ("mlflow", "alembic"):  # they log every table they make, and the stack of what they also raise
            logging.getLogger(noisy).setLevel(logging.CRITICAL)
        self.uri = uri
        if uri.startswith("sqlite:///"):
            file = Path(uri.removeprefix("sqlite:///"))
            file.parent.mkdir(parents=True, exist_ok=True)
            # Of two processes that make the tables of one file at once, one dies.
            with file_lock(file.with_name(f"{file.name}.lock")):
                if not file.exists():
                    _make_tables(file)
                with file.open("r+b"):  # MLflow would try for two minutes to open what this user may not
                    pass
                self._client = MlflowClient(uri, registry_uri=uri)
                self._experiment = self._experiment_id(experiment, Path(artifact_location).resolve())
        else:
            self._client = MlflowClient(uri, registry_uri=uri)
            self._experiment = self._experiment_id(experiment, None)

    def _experiment_id(self, name: str, artifacts: Path | None) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                location = None if artifacts is None else (artifacts / _folder_name(name)).as_uri()
                return self._client.create_experiment(name, artifact_location=location, tags=_EXPERIMENT)
            except MlflowException:
                found = self._client.get_experiment_by_name(name)  # another run has created it meanwhile
                if found is None:
                    raise
        if found.lifecycle_stage == "deleted":
            self._client.restore_experiment(found.experiment_id)
        return found.experiment_id

    def ensure_run(self, identity: str, known: str | None, name: str, start_ms: int) -> str:
        """Returns the id of the one MLflow run of a pipeline run; creates it if missing.

        It first searches by identity: a request that timed out, or a kill before the id was recorded, may have left
        a run. Of several (a server that answered late, twice) the oldest stays.
        """
        from mlflow.exceptions import MlflowException

        if known is not None:
            try:
                there = self._client.get_run(known).info
                if there.lifecycle_stage == "deleted":
                    self._client.restore_run(known)
                return there.run_id
            except MlflowException as error:
                if not is_missing(error):
                    raise
        found = self._client.search_runs([self._experiment], f"tags.`{_IDENTITY}` = '{identity}'", max_results=10)
        if found:
            oldest, *others = sorted(found, key=lambda run: (run.info.start_time, run.info.run_id))
            for other in others:
                self._client.delete_run(other.info.run_id)
            return oldest.info.run_id
        made = self._client.create_run(self._experiment, start_time=start_ms, tags={_IDENTITY: identity}, run_name=name)
        return made.info.run_id

    def send_points(self, run_id: str, points: Sequence[Point]) -> list[str]:
        """Stores metrics, at most `MAX_POINTS`; the store keeps a repeated point once.

        Returns:
            The keys that the store refuses permanently (a name it does not allow).

        Raises:
            RunDeleted: The run was deleted meanwhile.
        """
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        metrics = [Metric(p.key, p.value, p.time_ms, p.step) for p in points]
        try:
            self._client.log_batch(run_id, metrics=metrics)
        except MlflowException as error:
            if not is_refusal(error):
                raise
            if self._client.get_run(run_id).info.lifecycle_stage == "deleted":
                raise RunDeleted(f"the run {run_id} was deleted") from error
            if len(points) == 1:
                return [points[0].key]
            half = len(points) // 2
            return self.send_points(run_id, points[:half]) + self.send_points(run_id, points[half:])
        return []

    def set_params(self, run_id: str, params: Mapping[str, str]) -> dict[str, str]:
        """Stores new params; returns those stored with another value, which MLflow does not let change."""
        from mlflow.entities import Param

        there = self._client.get_run(run_id).data.params
        cut = {k: v[:_MAX_PARAM_LENGTH] for k, v in params.items()}
        new = [Param(k, v) for k, v in cut.items() if k not in there]
        for first in range(0, len(new), _MAX_PARAMS):
            self._client.log_batch(run_id, params=new[first : first + _MAX_PARAMS])
        return {k: v for k, v in cut.items() if there.get(k, v) != v}

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Stores tags; overwrites existing ones."""
        from mlflow.entities import RunTag

        new = [RunTag(k, v[:_MAX_TAG_LENGTH]) for k, v in tags.items()]
        for first in range(0, len(new), _MAX_PARAMS):
            self._client.log_batch(run_id, tags=new[first : first + _MAX_PARAMS])

    def set_dataset(self, run_id: str, name: str, digest: str, source: str, profile: str) -> None:
        """Stores the training data of a run as its input; storing it again changes nothing."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        # MLflow allows a digest of 36 characters; the profile has the full one.
        dataset = Dataset(name, digest[:36], "local", source, profile=profile)
        self._client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])

    def send_file(self, run_id: str, file: Path, folder: str | None) -> None:
        """Stores a file as an artifact."""
        self._client.log_artifact(run_id, str(file), folder)

    def send_folder(self, run_id: str, folder: Path, name: str) -> None:
        """Stores the files of a folder as artifacts below `name`."""
        self._client.log_artifacts(run_id, str(folder), name)

    def set_status(self, run_id: str, status: RunStatus, end_ms: int | None) -> None:
        """Stores the status; RUNNING removes the end time of an earlier status."""
        if status == "RUNNING":
            self._client.update_run(run_id, status="RUNNING")
        else:
            self._client.set_terminated(run_id, status, end_ms)

    def register(self, run_id: str, name: str, artifact: str, tags: Mapping[str, str]) -> str:
        """Registers a folder of artifacts as a model version; returns its number."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source = f"{self._client.get_run(run_id).info.artifact_uri}/{artifact}"
        return str(self._client.create_model_version(name, source, run_id, tags=dict(tags)).version)

    def read_run(self, run_id: str) -> MlflowRun:
        """Returns the run as the store has it."""
        return self._client.get_run(run_id)
