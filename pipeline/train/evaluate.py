"""The loss on fixed windows of the validation tokens: the same number at any world size."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from pipeline.checkpoint.layout import step_of
from pipeline.checkpoint.read import newest_checkpoint
from pipeline.data.dataset import TokenDataset, ValidationWindows, open_dataset
from pipeline.files import write_json
from pipeline.model.chunked_loss import IGNORED, LossParts
from pipeline.run.folder import Run
from pipeline.run.world import World
from pipeline.train.model import load_model


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts the validation tokens."""

    step: int
    """Finished steps of the model."""
    loss: float
    """Nats per token."""
    perplexity: float
    """exp(loss)."""
    bits_per_byte: float
    """Bits per UTF-8 byte of the text: unlike the loss, comparable between tokenizers."""
    tokens: int
    """Predicted tokens."""


@dataclass(frozen=True)
class Validation:
    """The first windows of a dataset's validation split, and how the ranks share them."""

    dataset: TokenDataset
    """The validation split."""
    windows: ValidationWindows
    """All its windows."""
    count: int
    """Number of windows to evaluate; fewer if there are fewer."""
    chunk: int
    """Windows per forward pass."""
    world: World
    """This process's place."""
    device: torch.device
    """Where the model is."""


@torch.no_grad()
def evaluate(loss_of: Callable[[Tensor, Tensor], LossParts], validation: Validation, step: int) -> Evaluation:
    """Returns the loss on the validation windows, the same number at any world size.

    Neither the chunks nor the order in which their losses are added depends on the world size, and so the sum does not.

    Args:
        loss_of: Token ids and targets to the loss; every rank calls it equally often, as ZeRO-3 demands.
        validation: The windows, and how the ranks share them.
        step: Finished steps of the model.
    """
    windows, chunk, world = validation.windows, validation.chunk, validation.world
    count = min(validation.count, windows.count)
    chunks = -(-count // chunk)
    sums = torch.zeros(chunks, dtype=torch.float64, device=validation.device)
    for turn in range(-(-chunks // world.size)):
        index = min(turn * world.size + world.rank, chunks - 1)
        x, y = windows.batch(index * chunk, min((index + 1) * chunk, count))
        mean = loss_of(*(_padded(t, chunk, fill).to(validation.device) for t, fill in ((x, 0), (y, IGNORED))))
        if turn * world.size + world.rank < chunks:
            sums[index] = mean.cross_entropy.double() * y.numel()
    if world.size > 1:
        dist.all_reduce(sums)
    tokens = count * y.shape[-1]
    loss = math.fsum(sums.tolist()) / tokens  # the only wait for the device, once all chunks are launched
    bits_per_byte = loss / math.log(2) * len(validation.dataset) / validation.dataset.bytes
    return Evaluation(step, loss, math.exp(min(loss, 700.0)), bits_per_byte, tokens)


def _padded(tokens: Tensor, rows: int, fill: int) -> Tensor:
    """Returns `(rows, context)` tokens: a chunk of another shape would be compiled on one rank alone."""
    return functional.pad(tokens, (0, 0, 0, rows - len(tokens)), value=fill)


def evaluate_run(run: Run) -> Evaluation:
    """Evaluates the newest checkpoint on the whole validation split, in one process, and writes evaluation.json.

    Raises:
        CheckpointError: There is no checkpoint that can be trusted.
        DataError: The dataset is not the run's.
    """
    config = run.config()
    checkpoint = newest_checkpoint(run.checkpoints)
    dataset = open_dataset(config.data.path, "validation", vocab_size=config.model.vocab_size)
    model = load_model(config, checkpoint)
    windows = ValidationWindows(dataset, config.model.context_length)
    chunk, device = config.train.micro_batch_size, model.device
    validation = Validation(dataset, windows, windows.count, chunk, World(), device)
    result = evaluate(lambda x, y: model(x, targets=y), validation, step_of(checkpoint) or 0)
    write_json(run.evaluation_file, asdict(result))
    return result
