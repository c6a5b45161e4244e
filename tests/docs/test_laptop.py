"""What README and docs show for one machine works as it stands there, on an experiment of ten steps."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests import experiment, processes
from tests.data.helpers import documents
from tests.docs.blocks import PAGES, ROOT, Block, shell_blocks

pytestmark = pytest.mark.slow

STEPS = 10
README = ROOT / "README.md"
OTHERS = [page for page in PAGES if page != README and shell_blocks(page, "laptop")]

# What a reader puts in place of a name, and smaller numbers.
_IN_PLACE_OF = {
    "runs/NAME": "runs/demo",
    "data/tokens": "data/demo/tokens",
    "step_00001000": f"step_{STEPS:08d}",
    "8000,9000,10000": "8,9,10",
    "max_iters=20000": "max_iters=4",
    "max_iters=40000": "max_iters=6",
    "max_iters=48000": "max_iters=8",
    "decay_iters=8000": "decay_iters=2",
    "https://mlflow.example.org": "sqlite:///elsewhere.db",
    " SIZE": " model.d_model=4096 model.num_heads=32 model.num_layers=32 model.d_ff=11008 train.micro_batch_size=2",
}


_DONE: set[tuple[str, ...]] = set()
"""Commands that pages share are run once."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working folder of a reader who has followed the README: its `configs/demo.yaml` is smaller."""
    folder = tmp_path_factory.mktemp("laptop")
    shutil.copytree(ROOT / "slurm", folder / "slurm")
    for seed, name in enumerate(("train/1800", "train/1900", "train/1990", "train/2000", "validation/2020")):
        file = folder / f"data/demo/text/{name}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(documents(150, seed=seed)))
    small = smaller(yaml.safe_load((ROOT / "configs/demo.yaml").read_text()))
    (folder / "configs").mkdir()
    (folder / "configs/demo.yaml").write_text(yaml.safe_dump(small))
    (folder / "long.yaml").write_text(yaml.safe_dump(small | {"name": "long", "tracking": {"uri": "none"}}))
    pipeline(folder, ["new", "my.yaml", "--like", "1b"])
    for block in shell_blocks(README, "laptop"):
        run_block(block, folder)
    return folder


def smaller(config: dict) -> dict:
    config["tokenizer"] = {"kind": "bytes"}
    config["model"] |= {"vocab_size": 257, "context_length": 32, "d_model": 32, "num_layers": 1, "d_ff": 64}
    del config["optimizer"]["cosine_cycle_iters"]
    config["optimizer"]["warmup_iters"] = 1
    config["train"] |= {
        "batch_size": 4, "micro_batch_size": 2, "max_iters": STEPS, "log_interval": 1, "val_interval": STEPS,
        "num_val_batches": 1, "checkpoint_interval": 1, "device": "cpu",
    }  # fmt: skip
    config["checkpoint"] = {"keep_last": STEPS}
    return config


def run_block(block: Block, folder: Path) -> None:
    """Runs the commands of a block one after the other; fails with the first that fails."""
    for command in block.commands:
        for name, value in _IN_PLACE_OF.items():
            command = command.replace(name, value)
        words = shlex.split(command, comments=True)
        if tuple(words) in _DONE:
            continue
        _DONE.add(tuple(words))
        if words[0] == "pipeline":
            pipeline(folder, words[1:])
        elif words[:4] == ["torchrun", "--nproc-per-node", "2", "-m"]:
            pipeline(folder, words[5:], world_size=2)
        else:
            # A home of its own, where commands may write.
            environ = {"PATH": "/usr/bin:/bin", "HOME": str(folder)}
            done = subprocess.run(["bash", "-ec", command], cwd=folder, env=environ, capture_output=True, text=True)
            assert done.returncode == 0, f"{block}\n{command}\n{done.stdout}{done.stderr}"


def pipeline(folder: Path, arguments: list[str], world_size: int = 1) -> None:
    log = folder / "log"
    log.unlink(missing_ok=True)
    if world_size == 1:
        ranks = processes.start_alone(arguments, log, folder)
    else:
        ranks = processes.fork(processes.command, (arguments, folder), world_size, log)
    ended = ranks.wait(120)
    ranks.end()
    assert ended and set(ranks.codes.values()) == {0}, f"pipeline {' '.join(arguments)}: {ranks.codes}\n{ranks.words()}"


def test_the_commands_of_the_readme(folder: Path):
    for name in ("demo", "wide"):
        assert experiment.last_step(folder / "runs" / name) == STEPS


@pytest.mark.parametrize("page", OTHERS, ids=lambda page: page.name)
def test_the_commands_of_a_page(page: Path, folder: Path):
    for block in shell_blocks(page, "laptop"):
        run_block(block, folder)
