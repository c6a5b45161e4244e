"""The loss on fixed windows of the validation tokens: the same number at any world size."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from pipeline.checkpoint.layout import step_of
from pipeline.checkpoint.read import newest_checkpoint
from pipeline.data.dataset import open_dataset
from pipeline.data.order.validation import ValidationWindows, validation_windows
from pipeline.files import write_json
from pipeline.model.chunked_loss import IGNORED, LossParts
from pipeline.run.folder import Run
from pipeline.run.world import World
from pipeline.train.model import load_model


@dataclass(frozen=True)
class SourceEvaluation:
    """How well a model predicts the validation tokens of one source."""

    loss: float
    """Nats per token."""
    bits_per_byte: float
    """Bits per UTF-8 byte of the text."""
    tokens: int
    """Predicted tokens."""


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts the validation tokens."""

    step: int
    """Finished steps of the model."""
    loss: float
    """Nats per token: the mean over the sources, each weighted by its tokens in the validation split."""
    perplexity: float
    """exp(loss)."""
    bits_per_byte: float
    """Bits per UTF-8 byte of the text: unlike the loss, comparable between tokenizers."""
    tokens: int
    """Predicted tokens."""
    sources: dict[str, SourceEvaluation] = field(default_factory=dict)
    """Each source, by its name."""

    def metrics(self) -> dict[str, float]:
        """Returns the numbers by the keys of metrics.jsonl."""
        found = {"val/loss": self.loss, "val/perplexity": self.perplexity, "val/bits_per_byte": self.bits_per_byte}
        for name, source in self.sources.items():
            found |= {f"val/{name}/loss": source.loss, f"val/{name}/bits_per_byte": source.bits_per_byte}
        return found


@dataclass(frozen=True)
class Validation:
    """The first windows of each source of a dataset's validation split, and how the ranks share them."""

    sources: tuple[ValidationWindows, ...]
    """All windows of each source."""
    count: int
    """Number of windows of each source to evaluate; fewer if there are fewer."""
    chunk: int
    """Windows per forward pass."""
    world: World
    """This process's place."""
    device: torch.device
    """Where the model is."""

    def chunks(self) -> list[tuple[ValidationWindows, int, int]]:
        """Returns the windows of each forward pass, on whichever rank: a source, the first one and the end."""
        return [
            (source, start, min(start + self.chunk, self.count, source.count))
            for source in self.sources
            for start in range(0, min(self.count, source.count), self.chunk)
        ]


@torch.no_grad()
def evaluate(loss_of: Callable[..., LossParts], validation: Validation, step: int) -> Evaluation:
    """Returns the loss on the validation windows, the same number at any world size.

    Neither the chunks nor the order in which their losses are added depends on the world size, and so the sum does not.

    Args:
        loss_of: A batch of the windows to the loss; every rank calls it equally often, as ZeRO-3 demands.
        validation: The windows, and how the ranks share them.
        step: Finished steps of the model.
    """
    chunks, world = validation.chunks(), validation.world
    sums = torch.zeros(len(chunks), dtype=torch.float64, device=validation.device)
    for turn in range(-(-len(chunks) // world.size)):
        index = min(turn * world.size + world.rank, len(chunks) - 1)
        windows, start, stop = chunks[index]
        parts = zip(windows.batch(start, stop), (0, IGNORED, 0), strict=False)
        mean = loss_of(*(_padded(part, validation.chunk, fill).to(validation.device) for part, fill in parts))
        if turn * world.size + world.rank < len(chunks):
            sums[index] = mean.cross_entropy.double() * windows.targets(start, stop)
    if world.size > 1:
        dist.all_reduce(sums)
    return _evaluation(step, chunks, sums.tolist())  # the only wait for the device, once all chunks are launched


def _evaluation(step: int, chunks: list[tuple[ValidationWindows, int, int]], sums: list[float]) -> Evaluation:
    sources = list(dict.fromkeys(windows for windows, _, _ in chunks))
    found = {}
    for source in sources:
        mine = [(start, stop) for windows, start, stop in chunks if windows is source]
        tokens = sum(source.targets(start, stop) for start, stop in mine)
        parts = (part for part, (windows, _, _) in zip(sums, chunks, strict=True) if windows is source)
        loss = math.fsum(parts) / tokens
        bits_per_byte = loss / math.log(2) * source.tokens / source.bytes
        found[source.name] = SourceEvaluation(loss, bits_per_byte, tokens)
    total, total_bytes = sum(source.tokens for source in sources), sum(source.bytes for source in sources)
    loss = math.fsum(source.tokens / total * found[source.name].loss for source in sources)
    bits_per_byte = loss / math.log(2) * total / total_bytes
    tokens = sum(source.tokens for source in found.values())
    return Evaluation(step, loss, math.exp(min(loss, 700.0)), bits_per_byte, tokens, found)


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
    vocab_size, folder = config.model.vocab_size, config.data.token_folder
    dataset = open_dataset(config.data.path, "validation", vocab_size=vocab_size, token_folder=folder)
    model = load_model(config, checkpoint)
    windows = validation_windows(dataset, config.model.context_length, config.model.document_mask)
    everything = max(source.count for source in windows)

    def loss_of(x: Tensor, y: Tensor, document_starts: Tensor | None = None) -> LossParts:
        parts: LossParts = model(x, targets=y, document_starts=document_starts)
        return parts

    validation = Validation(windows, everything, config.train.micro_batch_size, World(), model.device)
    result = evaluate(loss_of, validation, step_of(checkpoint) or 0)
    write_json(run.evaluation_file, asdict(result))
    return result
