"""What the engine hands to a checkpoint is what the optimizer really updates, wherever it is stored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pipeline.config.load import load_config
from pipeline.model.transformer import TransformerLM
from pipeline.run.world import World
from pipeline.train.engine.engine import Engine
from tests import processes
from tests.experiment import curve, events
from tests.train.conftest import Lab
from tests.train.engine.test_numerics import TOLERANCE, losses


def own_storages(world: World, config_file: str, stage: int, offload: bool) -> bool:
    """Whether every fragment is a view of the optimizer's tensors."""
    config = load_config(config_file, [f"train.zero_stage={stage}", f"train.offload_optimizer={json.dumps(offload)}"])
    torch.manual_seed(0)
    engine = Engine(TransformerLM(**config.model.model_dump()), config, world, torch.device("cpu"))
    if stage == 3:
        # On a GPU whose optimizer state is in host memory, DeepSpeed's accessors move it there first.
        kind, real = type(engine._engine.optimizer), engine._engine.optimizer.get_local_fp32_param
        kind.get_local_fp32_param = lambda self, *args, **kwargs: real(*args, **kwargs).clone()
    fragments = engine.fragments()
    updated = engine._partitions.updated_tensors()
    state = [tensor for flat in updated for tensor in engine._optimizer.state[flat].values() if torch.is_tensor(tensor)]
    storages = {tensor.untyped_storage().data_ptr() for tensor in (*updated, *state)}
    return all(t.untyped_storage().data_ptr() in storages for f in fragments for t in f.tensors.values())


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "offload"), [(0, False), (1, False), (2, True), (3, False), (3, True)])
def test_what_is_loaded_into_fragments_reaches_the_optimizer(
    lab: Lab, tmp_path: Path, stage: int, offload: bool
) -> None:
    config = str(lab.config("storages"))
    assert processes.on_ranks(own_storages, 2, tmp_path / "log", config, stage, offload) == [True, True]


@pytest.mark.slow
def test_weights_that_a_node_keeps_a_copy_of_are_resumed_too(lab: Lab) -> None:
    """DeepSpeed's hierarchical partitions: the node's copy is older than the load and must not be used after it."""
    settings = {"deepspeed": {"zero_optimization": {"zero_hpz_partition_size": 2}}}
    lab.train("hierarchical", 2, 3, "train.max_iters=5", **settings)
    run = lab.train("hierarchical", 2, 3, "train.max_iters=10", **settings)
    assert [e["step"] for e in events(run, "resumed")] == [5]
    assert losses(run) == pytest.approx([loss for _, loss in curve(lab.uninterrupted(1, 0))[:10]], rel=TOLERANCE)


@pytest.mark.slow
def test_what_deepspeed_refuses_is_one_message(lab: Lab, tmp_path: Path) -> None:
    config = lab.config("refused", deepspeed={"zero_optimization": {"no_such_setting": 2}})
    ranks = processes.start(["train", str(config)], 1, tmp_path / "log")
    assert ranks.wait(60) and ranks.codes == {0: 2}
    assert "pipeline: error: deepspeed: " in ranks.words()
    assert "no_such_setting" in ranks.words() and "Traceback" not in ranks.words()
