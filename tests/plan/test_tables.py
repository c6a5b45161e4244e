"""`pipeline plan` prints tables or JSON, names wrong options, and needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


def pipeline(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pipeline", *arguments], capture_output=True, text=True, check=False)


def test_the_command_prints_tables_and_json():
    shown = pipeline("plan", "configs/demo.yaml", "--nodes", "1,4", "--device", "a100")
    assert shown.returncode == 0, shown.stderr
    for words in ("ZeRO stage 0", "efficiency", "goodput", "cannot be shared", "docs/scaling.md"):
        assert words in shown.stdout
    rows = json.loads(pipeline("plan", "configs/demo.yaml", "--nodes", "1,4", "--json").stdout)
    assert [(row["nodes"], row["ranks"]) for row in rows] == [(1, 8), (4, 32)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "h900"], ["'h900'", "b200"]),
        (["--nodes", "1,zero"], ["--nodes 1,zero:"]),
        (["--nodes", "0"], ["--nodes 0:"]),
    ],
)
def test_wrong_options_are_named(arguments, words):
    done = pipeline("plan", "configs/demo.yaml", *arguments)
    assert done.returncode == 2 and all(word in done.stderr for word in words) and "Traceback" not in done.stderr


def test_planning_imports_no_torch():
    code = "import sys, pipeline.plan.plan, pipeline.plan.tables; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
