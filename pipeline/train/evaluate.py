"""Loss on fixed windows of the validation tokens: the same number at any world size."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.checkpoint.layout import step_of
from pipeline.checkpoint.read import newest_checkpoint
from pipeline.data.dataset import TokenDataset, ValidationWindows, open_dataset, validation_windows
from pipeline.files import write_json
from pipeline.model.loss import cross_entropy
from pipeline.run.folder import Run
from pipeline.run.world import World
from pipeline.train.model import load_model


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts the validation tokens.

    Attributes:
        step: Of the model.
        loss: Nats per token.
        perplexity: exp(loss).
        bits_per_byte: Bits per UTF-8 byte of the text, which tokenizers cannot flatter.
        tokens: Tokens that were predicted.
    """

    step: int
    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int


@torch.no_grad()
def evaluate(
    model: Callable[[Tensor], Tensor],
    dataset: TokenDataset,
    windows: ValidationWindows,
    *,
    step: int,
    count: int,
    chunk: int,
    context_length: int,
    world: World,
    device: torch.device,
) -> Evaluation:
    """Evaluates on the first `count` windows, shared by the ranks in chunks.

    The chunks and the order in which their losses are added are the same at any world size, and so is the sum.

    Args:
        model: Token ids to logits; every rank calls it equally often, as ZeRO-3 demands.
        dataset: The validation split.
        windows: Its windows.
        step: Finished steps of the model.
        count: Windows, at most; all if there are fewer.
        chunk: Windows a forward pass.
        context_length: Tokens of a window.
        world: This process's place.
        device: Where the model is.
    """
    count = min(count, windows.count)
    chunks = -(-count // chunk)
    sums = torch.zeros(chunks, dtype=torch.float64, device=device)
    for turn in range(-(-chunks // world.size)):
        index = min(turn * world.size + world.rank, chunks - 1)
        x, y = (t.to(device) for t in windows.batch(index * chunk, min((index + 1) * chunk, count)))
        mean = cross_entropy(model(x).flatten(0, 1), y.flatten())
        if turn * world.size + world.rank < chunks:
            sums[index] = mean.double() * y.numel()
    if world.size > 1:
        dist.all_reduce(sums)
    tokens = count * context_length
    loss = math.fsum(sums.tolist()) / tokens  # read once, at the end: the device need not wait before
    bits_per_byte = loss / math.log(2) * len(dataset) / dataset.bytes
    return Evaluation(step, loss, math.exp(min(loss, 700.0)), bits_per_byte, tokens)


def evaluate_run(run: Run) -> Evaluation:
    """Evaluates the newest checkpoint on the whole validation split, in one process, and writes evaluation.json.

    Raises:
        CheckpointError: There is no checkpoint that can be trusted.
        DataError: The dataset is not the run's.
    """
    config = run.config()
    checkpoint = newest_checkpoint(run.checkpoints)
    dataset = open_dataset(config.data.path, "validation", vocab_size=config.model.vocab_size)
    windows = validation_windows(dataset, config.model.context_length)
    model = load_model(config, checkpoint)
    result = evaluate(
        model,
        dataset,
        windows,
        step=step_of(checkpoint) or 0,
        count=windows.count,
        chunk=config.train.micro_batch_size,
        context_length=config.model.context_length,
        world=World(),
        device=model.lm_head.weight.device,
    )
    write_json(run.evaluation_file, asdict(result))
    return result
