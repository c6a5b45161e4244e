"""Every recipe, with its own paths, filter and tokenizer: checked for its site, prepared, trained with one layer."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from pipeline.check.check import run_checks
from pipeline.commands.new import recipes
from pipeline.config.load import load_config
from pipeline.data.manifest import DatasetManifest
from pipeline.data.tokenize.train import train_bpe
from tests import experiment, processes
from tests.cli.test_main import ROOT
from tests.data.helpers import TOKENIZER_SAMPLE, documents

RECIPES = [name for name in recipes() if name != "demo"]
ROWS, LEFT_OUT = 240, 60
STEPS = 3
# One layer of the recipe's width, in a context and with a vocabulary for which a CPU needs a second per step.
_REDUCED = (
    "model.num_layers=1", "model.context_length=64", "model.vocab_size=512", "train.batch_size=4",
    "train.micro_batch_size=2", f"train.max_iters={STEPS}", f"optimizer.cosine_cycle_iters={STEPS}",
    "optimizer.warmup_iters=1", "train.log_interval=1", "train.num_val_batches=1", "train.compile=false",
    "train.device=cpu", "data.validation_fraction=0.2", "tracking.uri=none",
)  # fmt: skip
# A layer of the large ones takes a CPU minutes: a quarter and an eighth of their width, with heads of the same size.
_NARROWER = {
    "1b": ("model.d_model=512", "model.num_heads=8", "model.num_kv_heads=2", "model.d_ff=2048"),
    "8b": ("model.d_model=512", "model.num_heads=4", "model.num_kv_heads=1", "model.d_ff=1792"),
}


def fineweb(folder: Path) -> None:
    """Writes Parquet with the columns of FineWeb-Edu; the filter of the recipes leaves out some of its rows."""
    rng = random.Random(1)
    short, doubtful = LEFT_OUT // 2, LEFT_OUT - LEFT_OUT // 2
    columns = {
        "text": documents(ROWS),
        "id": [f"<urn:uuid:{row}>" for row in range(ROWS)],
        "language": ["en"] * ROWS,
        "language_score": [0.7] * doubtful + [0.9 + rng.random() / 10 for _ in range(ROWS - doubtful)],
        "token_count": [rng.randint(50, 2000) for _ in range(ROWS - short)] + [12] * short,
    }
    folder.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "000_00000.parquet")


@pytest.fixture
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the configs and sites of the project, as a reader of the README has it; the working folder."""
    for name in ("configs", "slurm"):
        shutil.copytree(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_checked_prepared_and_trained(name: str, working_folder: Path):
    recipe = f"configs/{name}.yaml"
    config = load_config(recipe)
    (source,) = config.data.sources
    fineweb(Path(source.paths[0]).parent)
    tokenizer = Path(config.tokenizer.path or "")
    tokenizer.parent.mkdir(parents=True)
    tokenizer.write_text(train_bpe(TOKENIZER_SAMPLE, b"\xff", 500, [config.tokenizer.end_of_text], "gpt2"))

    site = re.search(r"slurm/sites/\S+\.yaml", Path(recipe).read_text())
    assert site is not None
    found = {check.name: check for check in run_checks(recipe, site[0], ["container.image=null"])}
    assert "of a h100" in found["memory"].found
    assert [(found[of].status, found[of]) for of in ("config", "memory", "data") if found[of].status != "ok"] == []

    reduced = [*_REDUCED, *_NARROWER.get(name, ())]
    for command in ("prepare", "train"):
        ranks = processes.start_alone([command, recipe, *reduced], working_folder / "log", working_folder)
        assert ranks.wait(200) and ranks.codes == {0: 0}, ranks.words()
    dataset = DatasetManifest.load(working_folder / config.data.path)
    assert (dataset.documents, dataset.dropped) == (ROWS - LEFT_OUT, LEFT_OUT)
    assert [step for step, _ in experiment.curve(working_folder / "runs" / name)] == list(range(1, STEPS + 1))
