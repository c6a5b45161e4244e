"""`pipeline evaluate --tasks`: tasks on checkpoints of a run, each once, however many processes ask for it."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from lm_eval import evaluator

from pipeline.checkpoint.layout import Manifest, published, step_of
from pipeline.checkpoint.pins import pin, unpin
from pipeline.checkpoint.read import newest_checkpoint, verify
from pipeline.data.tokenize.tokenizer import Tokenizer
from pipeline.errors import PipelineError, UsageError, in_words
from pipeline.evaluate.language_model import CheckpointLM
from pipeline.evaluate.tasks import Asked, TaskSet, build_requests, definition, load_task_sets, seed_draws, task_hash
from pipeline.files import naming, write_json
from pipeline.run.evaluations import TaskEvaluation, TaskMetric, TaskScores, evaluation_file, read_evaluation
from pipeline.run.folder import Run, step_name
from pipeline.run.world import World, world_from_environment
from pipeline.tracking.upload_state import lock
from pipeline.train.model import load_model
from pipeline.train.ranks.group import broadcast, gather, on_first, process_group

# One rank may have more work than another, and they meet only at the end of it.
_PATIENCE = timedelta(days=2)
_BOOTSTRAP = 100_000  # the harness's default
Show = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """The results of one name on one checkpoint."""

    results: TaskEvaluation
    is_new: bool
    """Whether they were computed now; otherwise they were there."""


def evaluate_tasks(
    run: Run,
    asked: Asked,
    harness: str,
    steps: int | str | None,
    show: Show = lambda line: None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Outcome]:
    """Evaluates tasks on checkpoints of a run and yields the results, those that were there included.

    An evaluation is repeated only if the checkpoint, a task's documents, prompts, definition or version, the number of
    examples or the limit differ. Another process that evaluates the same checkpoint is waited for.

    Args:
        run: The run.
        asked: The tasks.
        harness: Version of the harness.
        steps: A step; `every` for all checkpoints, the oldest first; None for the newest checkpoint.
        show: Prints a line for the user.
        advance: Is told the progress of the requests.

    Yields:
        On the first rank; on the others nothing.

    Raises:
        UsageError: No checkpoint has this step, or a task is unknown or refused.
        CheckpointError: A checkpoint is damaged.
        DataError: A task's data is missing, or its prompts cannot be made.
    """
    world = world_from_environment()
    sets = load_task_sets(asked)
    with _ranks(run, world):
        chosen: list[str] = []
        on_first(lambda: chosen.extend(str(path) for path in _checkpoints(run, steps)), world, _PATIENCE)
        evaluation = _Evaluation(run, world, asked, sets, harness, show, advance)
        for path in broadcast(chosen, world, _PATIENCE):
            yield from evaluation.of_checkpoint(Path(path))


@contextlib.contextmanager
def _ranks(run: Run, world: World) -> Iterator[None]:
    if world.size == 1:
        yield
        return
    import torch

    # The ranks exchange a few numbers and texts, for which no GPU is needed.
    with process_group(world, torch.device("cpu"), _PATIENCE, run.meeting_file(world.meeting)):
        yield


def _checkpoints(run: Run, steps: int | str | None) -> list[Path]:
    if steps is None:
        return [newest_checkpoint(run.checkpoints)]
    there = list(reversed(published(run.checkpoints)))
    if steps == "every":
        if not there:
            raise UsageError(f"{run.checkpoints}: holds no checkpoint; train the run first")
        return there
    wanted = [path for path in there if step_of(path) == steps]
    if not wanted:
        known = ", ".join(str(step_of(path)) for path in there) or "none"
        raise UsageError(f"{run.path}: has no checkpoint of step {steps}; there are: {known}")
    return wanted


class _Evaluation:
    """What is the same for all checkpoints."""

    def __init__(
        self,
        run: Run,
        world: World,
        asked: Asked,
        sets: Sequence[TaskSet],
        harness: str,
        show: Show,
        advance: Callable[[int, int], None],
    ) -> None:
        self._run, self._world, self._asked, self._sets = run, world, asked, sets
        self._harness, self._show, self._advance = harness, show, advance
        self._config = run.config()
        self._tokenizer = Tokenizer.load(run.tokenizer_file, self._config.tokenizer.end_of_text, run.path)
        self._definitions = {one.name: definition(one) for one in sets}
        self._hashes: dict[str, str] = {}
        on_first(self._take_hashes, world, _PATIENCE)

    def _take_hashes(self) -> None:
        seed_draws(self._sets)
        for name, task in ((name, task) for one in self._sets for name, task in one.tasks.items()):
            build_requests(name, task, self._asked.limit)
            self._hashes[name] = task_hash(task, self._asked.limit)

    def of_checkpoint(self, checkpoint: Path) -> Iterator[Outcome]:
        """Evaluates what was not, and yields all results."""
        step = step_of(checkpoint) or 0
        with self._alone(step) if self._world.is_first else contextlib.nullcontext():
            there: dict[str, TaskEvaluation] = {}
            on_first(lambda: there.update(self._there(checkpoint)), self._world, _PATIENCE)
            missing = broadcast([s.name for s in self._sets if s.name not in there], self._world, _PATIENCE)
            todo = [s for s in self._sets if s.name in missing]
            made = self._evaluated(checkpoint, todo) if todo else {}
        if self._world.is_first:
            for one in self._sets:
                yield Outcome((there | made)[one.name], one.name in made)

    @contextlib.contextmanager
    def _alone(self, step: int) -> Iterator[None]:
        """Holds the lock of a step; it goes with the process that holds it, however that ends."""
        file = self._run.evaluation_lock(step)
        with naming(file, "cannot be written", "evaluation writes its results into the run folder"):
            file.parent.mkdir(exist_ok=True)
            fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            try:
                if not lock(fd, wait=False):
                    self._show(f"step {step} is being evaluated by another process; waiting for it")
                    lock(fd, wait=True)
                yield
            finally:
                os.close(fd)

    def _there(self, checkpoint: Path) -> dict[str, TaskEvaluation]:
        """Returns the results that are there and still true."""
        digest = Manifest.load_named(checkpoint)[1]
        found = {}
        for one in self._sets:
            file = self._file(checkpoint, one.name)
            if not file.exists():
                continue
            results = read_evaluation(self._run, file)
            same = {name: self._of_task(name, task) for name, task in one.tasks.items()}
            old = {
                name: (s.get("hash"), s.get("version"), s.get("num_fewshot")) for name, s in results["tasks"].items()
            }
            defined = results.get("definition") == self._definitions[one.name]
            if results["checkpoint"] == digest and defined and old == same:
                found[one.name] = results
        return found

    def _of_task(self, name: str, task: Any) -> tuple[str | None, str | None, int]:
        return self._hashes.get(name), _version(task), int(task.get_config("num_fewshot"))

    def _file(self, checkpoint: Path, name: str) -> Path:
        asked = self._asked
        return evaluation_file(self._run, step_of(checkpoint) or 0, name, asked.num_fewshot, asked.limit)

    def _evaluated(self, checkpoint: Path, todo: list[TaskSet]) -> dict[str, TaskEvaluation]:
        """Evaluates tasks, publishes each name's results in a file, and returns them on the first rank."""
        holder = self._run.evaluations / step_name(step_of(checkpoint) or 0)
        with self._pinned(checkpoint, holder):
            on_first(lambda: verify(checkpoint), self._world, _PATIENCE)
            began = time.time()
            model = load_model(self._config, checkpoint, self._world.local_rank)
            lm = CheckpointLM(
                model, self._tokenizer, self._world.rank, self._world.size,
                lambda value: gather(value, self._world, _PATIENCE), self._advance,
            )  # fmt: skip
            seed_draws(todo)
            raw = self._raw(lm, todo)
        if not self._world.is_first:
            return {}
        digest, made = Manifest.load_named(checkpoint)[1], {}
        for one in todo:
            results = TaskEvaluation(
                name=one.name, step=step_of(checkpoint) or 0, checkpoint=digest, time=round(time.time(), 3),
                seconds=round(time.time() - began, 3), harness=self._harness, limit=self._asked.limit,
                num_fewshot=self._asked.num_fewshot, definition=self._definitions[one.name],
                tasks={name: self._scores(raw, name, task) for name, task in one.tasks.items()},
                groups={name: self._scores(raw, name, None) for name in one.groups if name in raw.get("groups", {})},
            )  # fmt: skip
            made[one.name] = results
            file = self._file(checkpoint, one.name)
            with naming(file, "cannot be written", "make room"):
                write_json(file, results)
        return made

    @contextlib.contextmanager
    def _pinned(self, checkpoint: Path, holder: Path) -> Iterator[None]:
        """Keeps a checkpoint from the retention of a run that is still training."""

        def take() -> None:
            with naming(self._run.path, "cannot be written", "evaluation writes its results into the run folder"):
                holder.mkdir(parents=True, exist_ok=True)
                pin(checkpoint, holder)
            if not checkpoint.is_dir():
                raise PipelineError(f"{checkpoint}: was just deleted by the run's retention; evaluate a newer one")

        try:
            on_first(take, self._world, _PATIENCE)
            yield
        finally:
            if self._world.is_first:
                unpin(checkpoint.parent, holder)

    def _raw(self, lm: CheckpointLM, todo: list[TaskSet]) -> Any:
        tasks = {name: task for one in todo for name, task in one.tasks.items()}
        groups = {name: group for one in todo for name, group in one.groups.items()}
        children = {name: group.child_names for name, group in groups.items()}
        try:
            return evaluator.evaluate(
                lm,
                {"tasks": tasks, "groups": groups, "group_map": children},
                limit=self._asked.limit,
                bootstrap_iters=_BOOTSTRAP if self._world.is_first else 0,
                log_samples=False,
            )
        except (PipelineError, OSError, MemoryError):
            raise
        except Exception as error:
            names = ", ".join(one.name for one in todo)
            raise PipelineError(
                f"tasks {names}: the harness failed ({type(error).__name__}: {in_words(error)})"
            ) from error

    def _scores(self, raw: Any, name: str, task: Any) -> TaskScores:
        """Returns the metrics of a task, or of a group, in our form."""
        given = raw["results"][name]
        better = raw["higher_is_better"].get(name, {})
        metrics: dict[str, TaskMetric] = {}
        for key, value in given.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            stderr = given.get(f"{metric}_stderr,{kind}")
            metrics[metric if kind == "none" else f"{metric}/{kind}"] = TaskMetric(
                value=_finite(value), stderr=_finite(stderr), higher_is_better=better.get(metric)
            )
        scores = TaskScores(documents=int(given.get("sample_len", 0)), metrics=metrics)
        if task is not None:
            found, version, shots = self._of_task(name, task)
            scores |= TaskScores(hash=found or "", version=version, num_fewshot=shots)  # type: ignore[typeddict-item]
        return scores


def _version(task: Any) -> str | None:
    return None if task.VERSION is None else str(task.VERSION)


def _finite(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):  # "N/A"
        return None
    return number if math.isfinite(number) else None
