"""Memory-mapped tokens and the batches drawn from them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline.config.data_sections import DataConfig
from pipeline.data.layout import TOKENIZER
from pipeline.data.manifest import SPLITS, DatasetManifest, Shard, SplitName, check_sizes
from pipeline.data.order import Order, sample_numbers
from pipeline.data.shard_maps import ShardMaps
from pipeline.errors import DataError
from pipeline.files import naming, sha256_file

Batch = tuple[torch.Tensor, torch.Tensor]


class TokenStream:
    """The tokens of several shards, in order, as one sequence of length `tokens`."""

    def __init__(self, shards: Sequence[Shard], dtype: np.dtype[Any], maps: ShardMaps) -> None:
        self.shards = tuple(shards)
        self._dtype = dtype
        self._maps = maps
        self._bounds = np.concatenate(([0], np.cumsum([s.tokens for s in shards], dtype=np.int64))).astype(np.int64)
        self.tokens = int(self._bounds[-1])

    def gather(self, starts: npt.NDArray[np.int64], length: int) -> npt.NDArray[Any]:
        """Returns `length` tokens from each start: `(len(starts), length)` in the dtype of the shards."""
        rows = np.empty((len(starts), length), self._dtype)
        first = np.searchsorted(self._bounds, starts, side="right") - 1
        offsets = (starts - self._bounds[first]).tolist()
        for row, shard, offset in zip(rows, first.tolist(), offsets, strict=True):
            filled = 0
            while filled < length:
                piece = self._maps.tokens(self.shards[shard].file)[offset : offset + length - filled]
                row[filled : filled + len(piece)] = piece
                filled += len(piece)
                shard, offset = shard + 1, 0
        return rows

    def locate(self, position: int) -> tuple[Shard, int]:
        """Returns the shard of a token and its offset in that shard."""
        index = int(np.searchsorted(self._bounds, position, side="right")) - 1
        return self.shards[index], position - int(self._bounds[index])


class TokenDataset:
    """One split of a dataset folder; `stream` holds all its tokens, source after source."""

    def __init__(self, path: Path, name: str, manifest: DatasetManifest, maps: ShardMaps) -> None:
        self.path = path
        self.name = name
        self.manifest = manifest
        self._maps = maps
        self.stream = self._stream(manifest.splits[name].shards)

    def __len__(self) -> int:
        return self.stream.tokens

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the text, for bits per byte."""
        return self.manifest.splits[self.name].bytes

    def source_streams(self) -> dict[str, TokenStream]:
        """Returns the tokens of each source that has any, in the order of the config."""
        shards = self.stream.shards
        return {
            name: self._stream([s for s in shards if s.source == name])
            for name in dict.fromkeys(s.source for s in shards)
        }

    def _stream(self, shards: Sequence[Shard]) -> TokenStream:
        return TokenStream(shards, self.manifest.numpy_dtype, self._maps)


def open_dataset(path: str | Path, split: SplitName, *, vocab_size: int | None = None) -> TokenDataset:
    """Opens one split of a dataset; see `open_splits`."""
    return open_splits(path, (split,), vocab_size=vocab_size)[split]


def open_splits(
    path: str | Path,
    splits: Sequence[SplitName] = SPLITS,
    *,
    vocab_size: int | None = None,
    tokenizer_digest: str | None = None,
    verify: bool = False,
) -> dict[SplitName, TokenDataset]:
    """Opens splits of a dataset after checking its manifest against the files, each of them once.

    Args:
        path: The dataset folder.
        splits: Which splits.
        vocab_size: Vocabulary size of the model, which every token id must be below.
        tokenizer_digest: Digest of the run's tokenizer, which must be the dataset's.
        verify: Also read every shard and compare its SHA-256.

    Raises:
        DataError: The dataset is unfinished, damaged or made for something else; the message names the file.
    """
    path = Path(path)
    manifest = DatasetManifest.load(path)
    _check_tokenizer_file(path, manifest)
    if tokenizer_digest is not None:
        refuse_other_tokenizer(path, manifest, tokenizer_digest)
    for split in splits:
        shards = manifest.splits[split].shards
        check_sizes(path, shards, manifest.numpy_dtype)
        if vocab_size is not None:
            _check_token_ids(path, manifest, shards, vocab_size)
        if not shards:
            raise DataError(
                f"{path}: the {split} split is empty; "
                f"raise data.validation_fraction, or give a source with split: {split}"
            )
        if verify:
            from pipeline.data.verify import verify_shards

            verify_shards(path, shards)
    maps = ShardMaps(path, manifest.numpy_dtype, sum(len(manifest.splits[split].shards) for split in splits))
    return {split: TokenDataset(path, split, manifest, maps) for split in splits}


def refuse_other_tokenizer(path: str | Path, manifest: DatasetManifest, digest: str) -> None:
    """Raises DataError unless a dataset was made with the tokenizer that has this digest."""
    if digest != manifest.tokenizer_digest:
        raise DataError(
            f"{path}: was made with the tokenizer {manifest.tokenizer_digest[:12]}, the run uses {digest[:12]}; "
            "point data.path at the dataset the run was started with"
        )


def _check_tokenizer_file(path: Path, manifest: DatasetManifest) -> None:
    file = path / TOKENIZER
    if not file.is_file():
        raise DataError(f"{file}: is missing; the tokens cannot be decoded without it: prepare the dataset again")
    with naming(file, "cannot be read", error=DataError):
        digest = sha256_file(file, path)
    if digest != manifest.tokenizer_digest:
        raise DataError(f"{file}: is not the tokenizer that made these tokens (its digest differs from the manifest's)")


def _check_token_ids(path: Path, manifest: DatasetManifest, shards: Sequence[Shard], vocab_size: int) -> None:
    for shard in shards:
        if shard.largest_id >= vocab_size:
            raise DataError(
                f"{path / shard.file}: holds token id {shard.largest_id}, but model.vocab_size is {vocab_size}; "
                f"set it to {manifest.vocab_size} or more, or prepare the data with another tokenizer"
            )


def get_batch(
    dataset: npt.NDArray[Any] | TokenDataset,
    batch_size: int,
    context_length: int,
    device: str | torch.device,
    generator: torch.Generator | None = None,
) -> Batch:
    """Draws windows at uniformly random offsets.

    Args:
        dataset: Token ids: a one-dimensional array (for example a memmap), or an opened dataset.
        batch_size: Number of windows.
        context_length: Tokens per window.
        device: Where the tensors go; a bad device raises torch's own error.
        generator: Source of the offsets; by default torch's global generator.

    Returns:
        `x` and `y`, int64, `(batch_size, context_length)`; `y` is one token to the right.

    Raises:
        DataError: The data is shorter than a window.
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
    """The global batches of a run: each is a pure function of (seed, index), however ranks divide its rows."""

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
        """Returns rows `[start, stop)` of global batch `index`: `x` and `y`, int64, CPU, `(stop - start, context)`."""
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
        """Returns the origin of rows `[start, stop)` of global batch `index`: shard, offset, source, epoch."""
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
    """The windows of every validation: side by side from the first token, without what follows the last whole one."""

    def __init__(self, dataset: TokenDataset, context_length: int) -> None:
        _check_long_enough(len(dataset), context_length, f"{dataset.path}: the {dataset.name} split")
        self._stream = dataset.stream
        self._context_length = context_length
        self.count = (len(dataset) - 1) // context_length

    def batch(self, start: int, stop: int) -> Batch:
        """Returns windows `[start, stop)`: `x` and `y`, int64 on the CPU."""
        starts = np.arange(start, min(stop, self.count), dtype=np.int64) * self._context_length
        return _tensors(self._stream.gather(starts, self._context_length + 1))


def _weight(known: dict[str, float], name: str, dataset: TokenDataset) -> float:
    if name not in known:
        raise DataError(f"{dataset.path}: holds the source {name!r}, but data.sources only names {', '.join(known)}")
    return known[name]


def _check_long_enough(tokens: int, context_length: int, what: str) -> None:
    if tokens < context_length + 1:
        raise DataError(
            f"{what}: {tokens} tokens are too few for one window of context_length + 1 = {context_length + 1}; "
            "use a shorter model.context_length or more text"
        )


def _tensors(rows: npt.NDArray[Any]) -> Batch:
    # Two contiguous tensors: views of one would break `.view(-1)` on the targets.
    return torch.from_numpy(rows[:, :-1].astype(np.int64)), torch.from_numpy(rows[:, 1:].astype(np.int64))
