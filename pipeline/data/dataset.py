"""Memory-mapped tokens and the batches drawn from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline.data.layout import TOKENIZER
from pipeline.data.manifest import SPLITS, DatasetManifest, Shard, SplitName, check_sizes
from pipeline.data.order.run_order import refuse_short
from pipeline.data.shard_maps import ShardMaps
from pipeline.errors import DataError
from pipeline.files import naming, sha256_file

Batch = tuple[torch.Tensor, ...]
"""Token ids and targets, `(rows, context)` int64; where documents are told apart, also where each token's starts."""


class TokenStream:
    """The tokens of several shards, in order, as one sequence of length `tokens`."""

    def __init__(self, shards: Sequence[Shard], dtype: np.dtype[Any], maps: ShardMaps) -> None:
        self.shards = tuple(shards)
        self._dtype = dtype
        self._maps = maps
        self._bounds = np.concatenate(([0], np.cumsum([s.tokens for s in shards], dtype=np.int64))).astype(np.int64)
        self.tokens = int(self._bounds[-1])

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the text."""
        return sum(shard.text_bytes for shard in self.shards)

    def gather(self, starts: npt.NDArray[np.int64], length: int) -> npt.NDArray[Any]:
        """Returns `length` tokens from each start: `(len(starts), length)` in the dtype of the shards."""
        rows = np.empty((len(starts), length), self._dtype)
        for row, places, shard, offset in self._pieces(starts, length):
            rows[row, places] = self._maps.tokens(shard)[offset : offset + places.stop - places.start]
        return rows

    def document_begins(self, starts: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.bool_]:
        """Returns, by the index, whether a document begins at each of `length` tokens: `(len(starts), length)`."""
        rows = np.zeros((len(starts), length), np.bool_)
        for row, places, shard, offset in self._pieces(starts, length):
            begins = self._maps.document_begins(shard, offset, places.stop - places.start)
            rows[row, begins + (places.start - offset)] = True
        return rows

    def _pieces(self, starts: npt.NDArray[np.int64], length: int) -> Iterator[tuple[int, slice, Shard, int]]:
        """Yields the row, the places in it, the shard and the first token there, of each piece of the rows."""
        first = np.searchsorted(self._bounds, starts, side="right") - 1
        offsets = (starts - self._bounds[first]).tolist()
        for row, (number, offset) in enumerate(zip(first.tolist(), offsets, strict=True)):
            filled = 0
            while filled < length:
                shard = self.shards[number]
                stop = min(length, filled + shard.tokens - offset)
                yield row, slice(filled, stop), shard, offset
                filled, number, offset = stop, number + 1, 0

    def locate(self, position: int) -> tuple[Shard, int]:
        """Returns the shard of a token and its offset in that shard."""
        index = int(np.searchsorted(self._bounds, position, side="right")) - 1
        return self.shards[index], position - int(self._bounds[index])

    def source_spans(self) -> list[tuple[str, int, int]]:
        """Returns the source of each stretch of tokens, with its first token and the one after its last."""
        spans: list[tuple[str, int, int]] = []
        for shard, begin in zip(self.shards, self._bounds.tolist(), strict=False):
            if spans and spans[-1][0] == shard.source:
                spans[-1] = (shard.source, spans[-1][1], begin + shard.tokens)
            else:
                spans.append((shard.source, begin, begin + shard.tokens))
        return spans


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


def open_dataset(
    path: str | Path, split: SplitName, *, vocab_size: int | None = None, token_folder: str | None = None
) -> TokenDataset:
    """Opens one split of a dataset; see `open_splits`."""
    return open_splits(path, (split,), vocab_size=vocab_size, token_folder=token_folder)[split]


def open_splits(
    path: str | Path,
    splits: Sequence[SplitName] = SPLITS,
    *,
    vocab_size: int | None = None,
    tokenizer_digest: str | None = None,
    verify: bool = False,
    token_folder: str | None = None,
) -> dict[SplitName, TokenDataset]:
    """Opens splits of a dataset after checking its manifest against the files, each of them once.

    Args:
        path: The dataset folder.
        splits: Which splits.
        vocab_size: Vocabulary size of the model, which every token id must be below.
        tokenizer_digest: Digest of the run's tokenizer, which must be the dataset's.
        verify: Also read every shard and compare its SHA-256.
        token_folder: The folder of adopted token files; see `DatasetManifest.tokens_in`.

    Raises:
        DataError: The dataset is unfinished, damaged or made for something else; the message names the file.
    """
    path = Path(path)
    manifest = DatasetManifest.load(path)
    tokens_in = manifest.tokens_in(path, token_folder)
    _check_tokenizer_file(path, manifest)
    if tokenizer_digest is not None:
        refuse_other_tokenizer(path, manifest, tokenizer_digest)
    for split in splits:
        shards = manifest.splits[split].shards
        check_sizes(path, shards, manifest.numpy_dtype, tokens_in=tokens_in)
        if vocab_size is not None:
            _check_token_ids(path, manifest, shards, vocab_size)
        if not shards:
            raise DataError(
                f"{path}: the {split} split is empty; "
                f"raise data.validation_fraction, or give a source with split: {split}"
            )
        if verify:
            from pipeline.data.verify import verify_shards

            verify_shards(path, shards, manifest.numpy_dtype, tokens_in=tokens_in)
    maps = ShardMaps(
        tokens_in or path, path, manifest.numpy_dtype, sum(len(manifest.splits[split].shards) for split in splits)
    )
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
) -> tuple[torch.Tensor, torch.Tensor]:
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
    refuse_short(len(dataset), context_length, "the data")
    starts = torch.randint(len(dataset) - context_length, (batch_size,), generator=generator).numpy()
    if isinstance(dataset, TokenDataset):
        rows = dataset.stream.gather(starts, context_length + 1)
    else:
        rows = np.stack([np.asarray(dataset[s : s + context_length + 1]) for s in starts.tolist()])
    x, y = tensors(rows)
    return x.to(device), y.to(device)


def tensors(rows: npt.NDArray[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns `x` and `y`, int64, of windows of one token more."""
    # Two contiguous tensors: views of one would break `.view(-1)` on the targets.
    return torch.from_numpy(rows[:, :-1].astype(np.int64)), torch.from_numpy(rows[:, 1:].astype(np.int64))
