"""`pipeline plan` prints tables or JSON, names wrong options, and needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pipeline.config.load import load_config
from pipeline.plan.plan import make_plan
from pipeline.plan.tables import print_plan
from pipeline.terminal import Terminal
from pipeline.text_format import count
from tests.plan.published import cluster_of


def pipeline(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pipeline", *arguments], capture_output=True, text=True, check=False)


def test_the_command_prints_tables_and_json():
    shown = pipeline("plan", "configs/demo.yaml", "--nodes", "1,4", "--device", "a100")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("demo: 1.84M parameters; 2,048 tokens per step, 2.05M in 1,000 steps\n")
    text = " ".join(shown.stdout.split())
    for words in ("of 79 GiB; ZeRO stage 0", "efficiency: the share", "MFU:", "goodput", "cannot be shared"):
        assert words in text
    rows = json.loads(pipeline("plan", "configs/demo.yaml", "--nodes", "1,4", "--json").stdout)
    assert [(row["nodes"], row["ranks"]) for row in rows] == [(1, 8), (4, 32)]


def test_a_precision_that_the_device_lacks_is_the_first_thing_said():
    shown = pipeline("plan", "configs/135m.yaml", "--nodes", "1", "--device", "v100", "train.precision=bf16")
    assert shown.stdout.startswith("WARNING: a V100 has no unit for bf16")
    assert "train.precision=fp32" in " ".join(shown.stdout.split())
    assert "WARNING" not in pipeline("plan", "configs/135m.yaml", "--nodes", "1", "train.precision=bf16").stdout


def test_what_training_would_refuse_with_so_many_ranks_is_said_first():
    settings = ["train.precision=bf16", "train.zero_stage=1", "train.batch_size=64", "train.micro_batch_size=4"]
    command = ["plan", "configs/demo.yaml", "--nodes", "1,2,4", "--per-node", "4", *settings]
    shown = " ".join(pipeline(*command).stdout.split())
    assert shown.startswith("WARNING: on 1, 2 nodes training refuses train.zero_stage: given 1, allowed: 2, which adds")
    parted = "deepspeed.zero_optimization.zero_hpz_partition_size=8"
    shown = " ".join(pipeline(*command, parted, "train.zero_stage=3").stdout.split())
    assert shown.startswith(f"WARNING: on 1 node training refuses {parted.partition('=')[0]}: given 8")
    assert [len(row["refused"]) for row in json.loads(pipeline(*command, "--json").stdout)] == [1, 1, 0]


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


@pytest.mark.parametrize(("config", "device"), [("8b", "h100"), ("8b", "mi300x"), ("135m", "v100"), ("demo", "cpu")])
@pytest.mark.parametrize("override", ["train.zero_stage=0", "train.max_iters=1000000"])
def test_nothing_is_wider_than_80_columns_or_cut(
    capsys: pytest.CaptureFixture[str], config: str, device: str, override: str
) -> None:
    cluster = cluster_of(device, price_per_device_hour=12.5, mtbf_node_hours=1e6)
    loaded = load_config(f"configs/{config}.yaml", [override])
    print_plan(loaded, make_plan(loaded, [1, 64, 4096], cluster), cluster, Terminal(width=80))
    shown = capsys.readouterr().out
    headings = [line.split() for line in shown.splitlines() if line.startswith(" nodes ")]
    assert (
        len(headings) == (6 if device == "h100" else 5)
        and max(map(len, shown.splitlines())) <= 80
        and "\u2026" not in shown
    )
    unit = "core" if device == "cpu" else "GPU"
    assert headings[3] == ["nodes", f"{unit}s", f"tok/s/{unit}", "days", f"{unit}-hours", "node-hours", "cost"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(2048, "2,048"), (134_515_008, "135M"), (999_900_000, "1B"), (1_235_814_400, "1.24B"), (15e12, "15T")],
)
def test_counts_have_three_digits(value: float, text: str) -> None:
    assert count(value) == text


def test_planning_imports_no_torch():
    code = "import sys, pipeline.plan.plan, pipeline.plan.tables; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
