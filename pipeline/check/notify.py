"""Sends a test of the user's messages about jobs: only the other end can tell whether an address is right."""

from __future__ import annotations

from pathlib import Path

from pipeline.check.result import Check
from pipeline.errors import PipelineError
from pipeline.launch.notify.send import Message, send
from pipeline.launch.notify.settings import load, settings_file
from pipeline.run.folder import Run


def check_notify(run: Run) -> Check:
    """Sends a test message from this machine in every way that the user's settings name."""
    file = settings_file()
    if file is None:
        return Check("notify", "ok", "jobs tell nobody how they end: there is no ~/.config/pipeline/notify.yaml")
    try:
        settings = load(file)
    except PipelineError as error:
        return Check("notify", "failed", str(error), "correct it, or remove the file")
    about = {"event": "test", "run": str(Path(run.path).absolute()), "job": ""}
    problems = send(settings, Message(about, f"{run.name}: a test by `pipeline check`"))
    if problems:
        return Check("notify", "warning", "; ".join(problems), f"correct {file}")
    return Check("notify", "ok", f"a test was sent from this machine, as {file} says")
