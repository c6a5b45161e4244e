"""`pipeline evaluate --tasks`: evaluates, shows the progress, prints the scores, and tells MLflow."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from pipeline.evaluate.harness import start_harness
from pipeline.run.evaluations import TaskEvaluation, TaskMetric, data_cache
from pipeline.run.folder import Run
from pipeline.run.world import world_from_environment
from pipeline.terminal import Terminal
from pipeline.text_format import echo, rounded_duration
from pipeline.tracking.upload.sync import sync_quietly


def evaluate_run_on_tasks(
    run: Run,
    names: tuple[str, ...],
    limit: int | None,
    num_fewshot: int | None,
    include_path: Path | None,
    steps: int | str | None,
) -> None:
    """Evaluates tasks on checkpoints of a run and prints the scores; see `evaluate_tasks`."""
    harness = start_harness(fetching=False)
    from pipeline.evaluate.evaluate import evaluate_tasks  # imports the harness
    from pipeline.evaluate.tasks import Asked

    first = world_from_environment().is_first
    asked = Asked(names, limit, num_fewshot, include_path)
    with _Requests(first) as requests:
        for outcome in evaluate_tasks(run, asked, harness, steps, _tell, requests.advance):
            requests.end()
            for line in lines(outcome.results, outcome.is_new):
                echo(line)
    if first:
        sync_quietly(run)


def fetch_tasks(names: tuple[str, ...], include_path: Path | None) -> None:
    """Fetches the data of tasks into the cache, from which evaluations take it."""
    start_harness(fetching=True)
    from pipeline.evaluate.tasks import Asked, load_task_sets

    found = load_task_sets(Asked(names, include_path=include_path), fetching=True)
    count = sum(len(one.tasks) for one in found)
    echo(f"{data_cache()}: holds the data of {count} task{'s' if count > 1 else ''}")


def lines(results: TaskEvaluation, is_new: bool) -> list[str]:
    """Returns the scores of a task, or of a group and its tasks, as lines for a terminal."""
    took = f"in {rounded_duration(results['seconds'])}" if is_new else "evaluated before"
    found = [f"step {results['step']}: {results['name']}, {took}"]
    for name, scores in {**results["groups"], **results["tasks"]}.items():
        shots = f", {scores['num_fewshot']}-shot" if "num_fewshot" in scores else ""
        found += [f"  {name}: {scores['documents']:,} documents{shots}"]
        found += [f"    {metric:<24} {_number(value)}" for metric, value in scores["metrics"].items()]
    return found


def _number(metric: TaskMetric) -> str:
    if metric["value"] is None:
        return "not finite"
    return f"{metric['value']:.4f}" + ("" if metric["stderr"] is None else f" ± {metric['stderr']:.4f}")


def _tell(line: str) -> None:
    echo(f"pipeline: {line}", sys.stderr)


class _Requests:
    """A bar of the requests that the first rank has answered, on a terminal."""

    def __init__(self, shown: bool) -> None:
        console = Terminal(stderr=True)
        columns: Sequence[str | TextColumn | BarColumn | MofNCompleteColumn | TimeRemainingColumn] = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        )  # fmt: skip
        self._bar = Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal))
        self._task: TaskID | None = None

    def __enter__(self) -> _Requests:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def advance(self, done: int, total: int) -> None:
        """Adds answered requests of one kind, of which there are `total`."""
        if self._task is None or self._bar.tasks[-1].finished:
            self.end()
            self._task = self._bar.add_task("requests", total=total)
        self._bar.advance(self._task, done)

    def end(self) -> None:
        """Removes the bar."""
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None
