"""Memory-mapped tokens and the batches drawn from them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from pipeline.config.data_sections import DataConfig
from pipeline.data.manifest import TOKENIZER, Manifest, Shard, check_sizes
from pipeline.data.order import Order, sample_numbers
from pipeline.errors import DataError
from pipeline.files import sha256_file

Batch = tuple[torch.Tensor, torch.Tensor]

# A mapping costs address space and one of the kernel's 65,530 map entries, so a corpus of
# very many shards keeps the ones it used first and opens the others anew.
_MOST_MAPPINGS = 8192


class TokenStream:
    """The tokens of several shards as one sequence.

    Attributes:
        tokens: Length of the sequence.
        shards: The shards, in order.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], dtype: np.dtype[Any]) -> None:
        self.shards = tuple(shards)
        self._folder = folder
        self._dtype = dtype
        self._bounds = np.concatenate(([0], np.cumsum([s.tokens for s in shards], dtype=np.int64))).astype(np.int64)
        self.tokens = int(self._bounds[-1])
        self._maps: dict[int, npt.NDArray[Any]] = {}

    def gather(self, starts: npt.NDArray[np.int64], length: int) -> npt.NDArray[Any]:
        """The tokens from each start on: `(len(starts), length)` in the dtype of the shards."""
        rows = np.empty((len(starts), length), self._dtype)
        first = np.searchsorted(self._bounds, starts, side="right") - 1
        offsets = (starts - self._bounds[first]).tolist()
        for row, shard, offset in zip(rows, first.tolist(), offsets, strict=True):
            piece = self._map(shard)[offset : offset + length]
            row[: len(piece)] = piece
            filled = len(piece)
            while filled < length:
                shard += 1
                piece = self._map(shard)[: length - filled]
                row[filled : filled + len(piece)] = piece
                filled += len(piece)
        return rows

    def locate(self, position: int) -> tuple[Shard, int]:
        """The shard of a token and its place there."""
        index = int(np.searchsorted(self._bounds, position, side="right")) - 1
        return self.shards[index], position - int(self._bounds[index])

    def _map(self, index: int) -> npt.NDArray[Any]:
        found = self._maps.get(index)
        if found is None:
            # A plain ndarray view: slicing an np.memmap costs ten times as much.
            found = np.asarray(np.memmap(self._folder / self.shards[index].file, self._dtype, mode="r"))
            if len(self._maps) < _MOST_MAPPINGS:
                self._maps[index] = found
        return found


class TokenDataset:
    """One split of a dataset folder.

    Attributes:
        path: The folder.
        name: `train` or `validation`.
        manifest: What the folder says about itself.
        stream: All tokens of the split, source after source.
    """

    def __init__(self, path: Path, name: str, manifest: Manifest) -> None:
        self.path = path
        self.name = name
        self.manifest = manifest
        self.stream = self._stream(manifest.splits[name].shards)

    def __len__(self) -> int:
        return self.stream.tokens

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the text, for bits per byte."""
        return self.manifest.splits[self.name].bytes

    def source_streams(self) -> dict[str, TokenStream]:
        """The tokens of each source that has any, in the order of the config."""
        shards = self.stream.shards
        return {
            name: self._stream([s for s in shards if s.source == name])
            for name in dict.fromkeys(s.source for s in shards)
        }

    def _stream(self, shards: Sequence[Shard]) -> TokenStream:
        return TokenStream(self.path, shards, self.manifest.numpy_dtype)


def open_dataset(
    path: str | Path,
    split: Literal["train", "validation"],
    *,
    vocab_size: int | None = None,
    tokenizer_digest: str | None = None,
    verify: bool = False,
) -> TokenDataset:
    """Opens a split, after checking the manifest against the files.

    Args:
        path: The dataset folder.
        split: Which split.
        vocab_size: Token ids must be below it: the model's.
        tokenizer_digest: The tokenizer must have it: the run's.
        verify: Read every shard and compare its SHA-256 too.

    Raises:
        DataError: The dataset is unfinished, damaged or made for something else; the message names the file.
    """
    path = Path(path)
    manifest = Manifest.load(path)
    shards = manifest.splits[split].shards
    _check_tokenizer(path, manifest, tokenizer_digest)
    check_sizes(path, shards, manifest.numpy_dtype)
    for shard in shards:
        if vocab_size is not None and shard.largest_id >= vocab_size:
            raise DataError(
                f"{path / shard.file}: holds token id {shard.largest_id}, but model.vocab_size is {vocab_size}; "
                f"set it to {manifest.vocab_size} or more, or prepare the data with another tokenizer"
            )
    if not shards:
        raise DataError(
            f"{path}: the {split} split is empty; raise data.validation_fraction, or give a source with split: {split}"
        )
    if verify:
        from pipeline.data.verify import verify_shards

        verify_shards(path, shards)
    return TokenDataset(path, split, manifest)


def _check_tokenizer(path: Path, manifest: Manifest, wanted: str | None) -> None:
    file = path / TOKENIZER
    if not file.is_file():
        raise DataError(f"{file}: is missing; the tokens cannot be understood without it: prepare the dataset again")
    if sha256_file(file) != manifest.tokenizer_digest:
        raise DataError(f"{file}: is not the tokenizer that made these tokens (its digest differs from the manifest's)")
    if wanted is not None and wanted != manifest.tokenizer_digest:
        raise DataError(
            f"{path}: was made with the tokenizer {manifest.tokenizer_digest[:12]}, the run uses {wanted[:12]}; "
            "point data.path at the dataset the run was started with"
        )


def get_batch(
    dataset: npt.NDArray[Any] | TokenDataset,
    batch_size: int,
    context_length: int,
    device: str | torch.device,
    generator: torch.Generator | None = None,
) -> Batch:
    """Windows at uniformly random places.

    Args:
        dataset: Token ids: a one-dimensional array, a memmap say, or an opened dataset.
        batch_size: Windows.
        context_length: Tokens of a window.
        device: Where the tensors go; a bad one raises torch's own error.
        generator: Source of the places; by default torch's global one.

    Returns:
        `x` and `y`, int64, `(batch_size, context_length)`; `y` is one token to the right.

    Raises:
        DataError: The data are shorter than a window.
    """
    _check_long_enough(len(dataset), context_length, "the data")
    starts = torch.randint(len(dataset) - context_length, (batch_size,), generator=generator).numpy()
    if isinstance(dataset, TokenDataset):
        rows = dataset.stream.gather(starts, context_length + 1)
    else:
        rows = np.stack([np.asarray(dataset[s : s + context_length + 1]) for s in starts.tolist()])
    x, y = _tensors(rows)
    return x.to(device), y.to(device)


class BatchReader:
    """The global batches of a run: each a pure function of (seed, index), whoever reads which rows of it."""

    def __init__(
        self, dataset: TokenDataset, data_config: DataConfig, *, seed: int, context_length: int, batch_size: int
    ) -> None:
        self._batch_size = batch_size
        self._context_length = context_length
        if data_config.mixing == "weighted":
            self._streams = list(dataset.source_streams().values())
            names = list(dataset.source_streams())
            known = {s.name: s.weight for s in data_config.sources}
            weights = tuple(_weight(known, name, dataset) for name in names)
        else:
            names, self._streams, weights = [f"the {dataset.name} split"], [dataset.stream], None
        for name, stream in zip(names, self._streams, strict=True):
            _check_long_enough(stream.tokens, context_length, f"{dataset.path}: {name}")
        self.order = Order(data_config.order, tuple(s.tokens for s in self._streams), weights, context_length, seed)

    def batch(self, index: int, start: int, stop: int) -> Batch:
        """Rows `[start, stop)` of global batch `index`: `x` and `y`, int64 on the CPU, `(stop - start, context)`."""
        sources, starts = self.order.draw(sample_numbers(index, start, stop, self._batch_size))
        length = self._context_length + 1
        if len(self._streams) == 1:
            return _tensors(self._streams[0].gather(starts, length))
        rows = np.empty((stop - start, length), self._streams[0].gather(starts[:0], 1).dtype)
        for source in np.unique(sources).tolist():
            here = sources == source
            rows[here] = self._streams[source].gather(starts[here], length)
        return _tensors(rows)

    def describe(self, index: int, start: int, stop: int) -> list[dict[str, Any]]:
        """Where rows `[start, stop)` of global batch `index` come from: shard, offset, source, epoch."""
        samples = sample_numbers(index, start, stop, self._batch_size)
        sources, starts = self.order.draw(samples)
        described = []
        for source, place, epoch in zip(
            sources.tolist(), starts.tolist(), self.order.epochs(samples).tolist(), strict=True
        ):
            shard, offset = self._streams[source].locate(place)
            described.append({"shard": shard.file, "offset": offset, "source": shard.source, "epoch": epoch})
        return described


class ValidationWindows:
    """Fixed windows that do not overlap, from the first token on.

    Attributes:
        count: Windows; the tokens after the last whole one are left out.
    """

    def __init__(self, dataset: TokenDataset, context_length: int) -> None:
        _check_long_enough(len(dataset), context_length, f"{dataset.path}: the {dataset.name} split")
        self._stream = dataset.stream
        self._context_length = context_length
        self.count = (len(dataset) - 1) // context_length

    def batch(self, start: int, stop: int) -> Batch:
        """Windows `[start, stop)`: `x` and `y`, int64 on the CPU."""
        starts = np.arange(start, min(stop, self.count), dtype=np.int64) * self._context_length
        return _tensors(self._stream.gather(starts, self._context_length + 1))


def validation_windows(dataset: TokenDataset, context_length: int) -> ValidationWindows:
    """The windows of a split on which every validation of a run is done."""
    return ValidationWindows(dataset, context_length)


def _weight(known: dict[str, float], name: str, dataset: TokenDataset) -> float:
    if name not in known:
        raise DataError(
            f"{dataset.path}: holds the source {name!r}, which data.sources does not name; it names {', '.join(known)}"
        )
    return known[name]


def _check_long_enough(tokens: int, context_length: int, what: str) -> None:
    if tokens < context_length + 1:
        raise DataError(
            f"{what}: {tokens} tokens are too few for one window of context_length + 1 = {context_length + 1}; "
            "take a shorter model.context_length or more text"
        )


def _tensors(rows: npt.NDArray[Any]) -> Batch:
    # Two contiguous tensors: views of one would break `.view(-1)` on the targets.
    return torch.from_numpy(rows[:, :-1].astype(np.int64)), torch.from_numpy(rows[:, 1:].astype(np.int64))
