"""torch.compile makes one graph of a block, at every ZeRO stage; validation adds one; a restart compiles nothing."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from pipeline.config.load import load_config
from pipeline.data.dataset import open_dataset
from pipeline.data.order.documents import document_starts
from pipeline.data.order.validation import validation_windows
from pipeline.model.chunked_loss import IGNORED
from pipeline.train.evaluate import _padded
from tests import processes
from tests.experiment import events
from tests.train.conftest import Lab
from tests.train.engine.test_numerics import losses
from tests.train.engine.test_partitions import new_engine, train_step

pytestmark = pytest.mark.usefixtures("alone")

# Otherwise stage 3 would keep all these small weights whole, and its hooks would have nothing to do.
FETCHED = {"deepspeed.zero_optimization.stage3_param_persistence_threshold": 0}
CASES = [(stage, mode) for stage in (0, 1, 2, 3) for mode in ("none", "full", "selective")]
FAST = [(3, "selective")]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """Counts the graphs that a cheap compiler makes; a break in one is an error."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter, fullgraph=True))
    return counter


@pytest.mark.parametrize(
    ("stage", "mode"), [pytest.param(*case, marks=[] if case in FAST else pytest.mark.slow) for case in CASES]
)
@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_all_blocks_share_one_graph_for_training_and_one_for_validation(
    tmp_path: Path, graphs: CompileCounterWithBackend, stage: int, mode: str, precision: str
) -> None:
    settings: dict[str, Any] = {"model.num_layers": 3, "train.activation_checkpointing": mode}
    settings |= {"train.precision": precision} | (FETCHED if stage == 3 else {})
    engine = new_engine(tmp_path, stage, **settings, **{"train.compile": True})
    found = [train_step(engine, seed).loss for seed in (1, 2, 3)]
    assert graphs.frame_count == 1
    ids = torch.randint(257, (4, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for rows in (4, 3, 1, 4):
            x, y = ids[:rows, :-1], ids[:rows, 1:]
            engine.loss(_padded(x, 4, 0), _padded(y, 4, IGNORED))
    assert graphs.frame_count == 2
    train_step(engine, 4)
    assert graphs.frame_count == 2, "training is not compiled again after a validation"

    eager = new_engine(tmp_path, stage, **settings)
    tolerance = 1e-6 if precision == "fp32" else 4e-3
    assert found == pytest.approx([train_step(eager, seed).loss for seed in (1, 2, 3)], rel=tolerance)
    assert graphs.frame_count == 2


def test_other_documents_need_no_other_graph(tmp_path: Path, graphs: CompileCounterWithBackend) -> None:
    settings = {"model.num_layers": 3, "model.document_mask": True}
    engines = [new_engine(tmp_path, 2, **settings, **{"train.compile": compiles}) for compiles in (True, False)]
    generator = torch.Generator().manual_seed(0)
    for seed in (1, 2, 3):
        ids = torch.randint(257, (4, 17), generator=generator)
        starts = document_starts(ids[:, :-1] % 5, seed)  # another number of documents each time
        compiled, eager = (engine.loss(ids[:, :-1], ids[:, 1:], starts).loss for engine in engines)
        torch.testing.assert_close(compiled, eager)
    assert graphs.frame_count == 1


def train_and_count(arguments: list[str], report: str) -> None:
    """Runs the command and writes what the compiler did."""
    try:
        processes.command(arguments)
    finally:
        Path(report).write_text(json.dumps({kind: dict(counts) for kind, counts in counters.items()}))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_restart_compiles_nothing_and_stays_on_the_curve(lab: Lab, tmp_path: Path) -> None:
    """Counted by the compiler itself, in both starts; the last chunk of a validation has no graph of its own."""
    settings = {
        "train.compile": True,
        "train.micro_batch_size": 4,
        "train.num_val_batches": 100,
        "train.val_interval": 5,
    }
    config = str(lab.config("compiled", **settings))
    compiled = []
    for until in (7, 12):
        report, log = str(tmp_path / f"{until}.json"), tmp_path / f"{until}.log"
        arguments = ["train", config, "train.zero_stage=2", f"train.max_iters={until}"]
        ranks = processes.fork(train_and_count, (arguments, report), 1, log)
        finished = ranks.within(ranks.poll, 300)
        ranks.end()
        assert finished and ranks.codes == {0: 0}, ranks.words()
        compiled.append(json.loads(Path(report).read_text()))
    first, second = compiled
    for found in compiled:
        assert found["stats"]["unique_graphs"] == 2 and not found.get("graph_break")
    assert first["inductor"]["fxgraph_cache_miss"] >= 2
    assert second["inductor"]["fxgraph_cache_hit"] >= 2
    for part in ("inductor", "aot_autograd"):
        assert not [kind for kind in second[part] if kind.endswith("_cache_miss")], part
    run = Path(load_config(config).runs_dir) / "compiled"
    (windows,) = validation_windows(open_dataset(load_config(config).data.path, "validation"), 16)
    assert windows.count % 4, "the last chunk of a validation is smaller"
    assert any((run / "compiled").iterdir())
    assert [e["step"] for e in events(run, "resumed")] == [7]
    assert losses(run) == pytest.approx(losses(lab.uninterrupted(1, 2))[:12], rel=1e-5)
