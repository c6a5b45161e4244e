"""The main job on this machine: prepare, train, evaluate, compare, sample; and the table at its end."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipeline.config import Config
from pipeline.errors import UsageError
from pipeline.files import write_text
from pipeline.run import Run, open_run, run_for


def run_all(config: Config) -> None:
    """Takes raw text to a trained model and prints what came of it; every stage goes on from where it was left.

    Raises:
        UsageError: Several processes were started; they would all prepare the same data.
    """
    from pipeline.train.world import world_from_environment

    if world_from_environment().size > 1:
        raise UsageError("`pipeline run` is one process; prepare first, then start `pipeline train` several times")
    from pipeline.data.build import prepare
    from pipeline.train.evaluate import evaluate_run
    from pipeline.train.loop import train

    began = time.monotonic()
    prepare(config)
    result = train(config)
    run = run_for(config)
    evaluation = evaluate_run(run)
    print_results(run, config, evaluation, result, time.monotonic() - began)
