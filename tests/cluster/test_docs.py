"""What README and docs show for a cluster works as it stands there: on devclusters, in the CPU image.

Each page is one shell in a folder of its own. A reader adapts what `pipeline new` has written: so does `adapt`, which
makes the model small and the site that of the devcluster. The CPU image stands in the place of the one for CUDA.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pipeline.data.tokenize.train import train_bpe
from tests import experiment
from tests.cluster.support import ROOT, Cluster, pipeline
from tests.container.support import cpu_image
from tests.data.helpers import TOKENIZER_SAMPLE, documents
from tests.docs.blocks import PAGES, shell_blocks
from tests.docs.test_laptop import smaller
from tests.examples.test_recipes import fineweb

STEPS = 20
PAGES_HERE = [page for page in PAGES if shell_blocks(page, "cluster")]

pytestmark = [pytest.mark.container, pytest.mark.timeout(900)]

_ADAPT = """
import sys, yaml
from tests.cluster.test_docs import adapted, ROOT
for name in sys.argv[1:]:
    if name == "my-site.yaml":
        tree = yaml.safe_load((ROOT / "slurm/sites/devcluster.yaml").read_text()) | {"name": "my-site"}
    else:
        tree = adapted(yaml.safe_load(open(name)))
    yaml.safe_dump(tree, open(name, "w"))
"""
# A command that has no end, that this machine cannot do, or before which a reader waits: what it is for is done.
_INSTEAD = {
    "pipeline image build --base cuda": 'mkdir -p build/images && ln -s "$CPU_IMAGE" build/images/pipeline-cuda.sif',
    "pipeline status --watch": "timeout 4 pipeline status --watch || [ $? = 124 ]",
    "pipeline devcluster shell": "pipeline devcluster shell </dev/null",
    "pipeline devcluster kill-node 1":  # while it trains
    "until [ -s runs/demo/metrics.jsonl ]; do sleep 0.5; done; pipeline devcluster kill-node 1",
    "make data/demo/text": "test -d data/demo/text",
}

# The page of sweeps takes a config, a site, an image and a file of rows for granted.
_BEFORE_SWEEPS = (
    "pipeline new my.yaml --like 135m --site my-site.yaml",
    "adapt my.yaml my-site.yaml",
    _INSTEAD["pipeline image build --base cuda"],
    r"printf 'name,train.seed\nsmall,1\nmedium,2\n' >sizes.csv",
)


def adapted(config: dict) -> dict:
    """The recipe with one narrow layer and few steps; its data, filter, tokenizer, precision and image stay."""
    config["model"] |= {
        "vocab_size": 512, "context_length": 32, "d_model": 64, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1,
        "d_ff": 128,
    }  # fmt: skip
    config["optimizer"] |= {"warmup_iters": 2}
    config["train"] |= {
        "batch_size": 8, "micro_batch_size": 2, "max_iters": STEPS, "log_interval": 1, "val_interval": STEPS,
        "num_val_batches": 1, "checkpoint_interval": STEPS, "compile": False,
    }  # fmt: skip
    config["data"]["validation_fraction"] = 0.2
    config["tracking"]["uri"] = "none"
    return config


def script(page: Path) -> str:
    """The commands of a page, each shown before it is run; `pipeline new` is followed by what a reader changes."""
    lines = ["set -ex"]
    if page.stem == "sweeps":
        lines += _BEFORE_SWEEPS
    for block in shell_blocks(page, "cluster"):
        for command in (shown.partition("  #")[0].strip() for shown in block.commands):
            command = command.replace("runs/my-sweep-1a2b3c4d", "runs/my-sweep-*")
            lines.append(_INSTEAD.get(command, command))
            if command.startswith("pipeline new "):
                lines.append(f"adapt {command.split()[2]} my-site.yaml")
    return "\n".join(lines)


def own_cluster(folder: Path) -> Path:
    """Where a page that brings up a devcluster has it: a short path, since it holds sockets."""
    return folder.parent.parent / folder.name[:2]


@pytest.fixture
def folder(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A working folder as a clone has it, with text and tokenizers; takes down the devcluster that a page brings up."""
    page: Path = request.getfixturevalue("page")
    folder = cluster.work / page.stem
    for name in ("pipeline/devcluster", "bin", "configs", "data/demo/text/train", "data/demo/text/validation"):
        (folder / name).mkdir(parents=True)
    (folder / "pipeline/devcluster/install.sh").symlink_to(ROOT / "pipeline/devcluster/install.sh")
    shutil.copytree(ROOT / "slurm", folder / "slurm")
    demo = smaller(yaml.safe_load((ROOT / "configs/demo.yaml").read_text()))
    (folder / "configs/demo.yaml").write_text(yaml.safe_dump(demo))
    for name in ("train/1800", "train/1900", "train/1990", "train/2000", "validation/2020"):
        (folder / f"data/demo/text/{name}.txt").write_text("\n".join(documents(200)))
    fineweb(folder / "data/fineweb-edu/sample/100BT")
    for name, end in (("SmolLM2-135M", "<|endoftext|>"), ("Llama-3.2-1B", "<|end_of_text|>")):
        (folder / "tokenizers" / name).mkdir(parents=True)
        made = train_bpe(TOKENIZER_SAMPLE, b"\xff", 500, [end], "gpt2")
        (folder / "tokenizers" / name / "tokenizer.json").write_text(made)
    for name, does in (
        ("pipeline", f'"{sys.executable}" -m pipeline "$@"'),
        ("adapt", f'"{sys.executable}" -c \'{_ADAPT}\' "$@"'),
        ("sudo", '"$@"'),
    ):
        (folder / "bin" / name).write_text(f"#!/bin/sh\nexec {does}\n")
        (folder / "bin" / name).chmod(0o755)
    try:
        yield folder
    finally:
        if own_cluster(folder).exists():
            pipeline("devcluster", "down", "--state", str(own_cluster(folder)))
        cluster.cancel_all()


@pytest.mark.parametrize("page", PAGES_HERE, ids=lambda page: page.name)
def test_the_commands_of_a_page(page: Path, folder: Path, cluster: Cluster):
    own = {
        "PATH": f"{folder / 'bin'}:{cluster.env['PATH']}",
        "PIPELINE_DEVCLUSTER": str(own_cluster(folder)),
        "CPU_IMAGE": str(cpu_image()),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        ["bash", "-c", script(page)],
        cwd=folder,
        env={**cluster.env, **own},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    if page.stem == "zero-to-1b":
        run = folder / "runs" / "1b"
        assert [step for step, _ in experiment.curve(run)] == list(range(1, STEPS + 1))
        assert (run / "report.html").exists() and list(run.glob("export*/**/*.safetensors"))
