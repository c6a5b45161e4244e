"""A model folder in Hugging Face's format that a run starts from: checked as a whole, and read in parts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.config.model_section import ModelConfig
from pipeline.errors import UsageError, listing
from pipeline.files import naming, read_json, sha256_bytes, sha256_file
from pipeline.huggingface.architectures import is_rotated, other_tensors, shapes, their_name, to_pairs
from pipeline.huggingface.config_json import model_section
from pipeline.huggingface.model_folder import CONFIG, INDEX, TOKENIZER, WEIGHTS
from pipeline.huggingface.safetensors_header import Stored, stored_tensors

_AT_ONCE = 1 << 22  # elements
_COMPUTED = ".rotary_emb.inv_freq"
"""End of the names of tables that old folders hold beside the weights; they follow from config.json."""
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class OpenWeights:
    """The weights of a folder, under our names; every check but that of the values is made at once.

    Args:
        folder: The folder.
        model: The run's model, which must be the folder's; only the context may be shorter or longer.

    Raises:
        UsageError: Something is missing, surplus, damaged, of another shape, or cannot be read by design.
    """

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        self.folder = folder
        self._head_dim = model.head_size
        described = read_json(folder / CONFIG, folder, UsageError)
        _refuse_other_model(folder, model_section(described, str(folder / CONFIG)), model)
        self._small = {name: self._digest(name) for name in (CONFIG, TOKENIZER)}
        self.files = self._weight_files()
        self._stored: dict[str, Stored] = {}
        self._open_files: dict[Path, Any] = {}
        for file in self.files:
            for name, stored in stored_tensors(file).items():
                if name in self._stored:
                    raise UsageError(f"{file}: holds {name}, which {self._stored[name].file.name} holds too")
                self._stored[name] = stored
        self._refuse_other_tensors({their_name(name): shape for name, shape in shapes(model)}, model.tie_embeddings)

    def refuse_other_tokenizer(self, data: str | Path, digest: str) -> None:
        """Raises UsageError unless the data was prepared with the folder's tokenizer, whose digest is given."""
        if digest != self._small[TOKENIZER]:
            raise UsageError(
                f"{data}: was made with the tokenizer {digest[:12]}, and {self.folder / TOKENIZER} is "
                f"{self._small[TOKENIZER][:12]}; prepare the data with `tokenizer: {{kind: file, path: "
                f"{self.folder / TOKENIZER}}}`"
            )

    def check_values(self, file: Path) -> str:
        """Returns the SHA-256 of one of the weight files after checking that all of its values are finite.

        Raises:
            UsageError: A value is not finite, or a stored output layer is not the embedding that it is tied to.
        """
        for name, stored in self._stored.items():
            if stored.file == file and not all(bool(part.isfinite().all()) for part in self._parts(name)):
                raise UsageError(f"{file}: {name} holds a value that is not finite; fetch the file again")
        return self._digest(file.name)

    def digest(self, checked: dict[str, str]) -> str:
        """Returns what names the content of the folder, given the SHA-256 of each weight file by its name."""
        return sha256_bytes(json.dumps({**self._small, **checked}, sort_keys=True).encode())

    def read(self, key: str, name: str, start: int, out: Tensor) -> None:
        """Copies elements `[start, start + len(out))` of one of our flattened parameters into `out`.

        Args:
            key: `weight`; there are no moments.
            name: Our name.
            start: First element.
            out: One-dimensional, on any device.
        """
        if key != "weight":
            raise ValueError(f"a model folder holds no {key}")
        source = self._slice(their_name(name))
        shape = source.get_shape()
        width = shape[1] if len(shape) == 2 else 1
        whole = self._head_dim if is_rotated(name) else 1  # rows that change places with each other
        rows = whole * max(1, _AT_ONCE // (whole * width))
        stop = start + out.numel()
        end = -(-stop // (whole * width)) * whole
        for first in range(start // (whole * width) * whole, end, rows):
            part = source[first : min(first + rows, end)].float()
            flat = (to_pairs(part, self._head_dim) if is_rotated(name) else part).flatten()
            low, high = max(start, first * width), min(stop, first * width + flat.numel())
            out[low - start : high - start].copy_(flat[low - first * width : high - first * width])

    def close(self) -> None:
        """Unmaps the files."""
        self._open_files.clear()

    def _digest(self, name: str) -> str:
        with naming(self.folder / name, "cannot be read", error=UsageError):
            return sha256_file(self.folder / name, self.folder)

    def _weight_files(self) -> list[Path]:
        if (self.folder / WEIGHTS).exists():  # transformers reads it and ignores an index beside it
            return [self.folder / WEIGHTS]
        if (self.folder / INDEX).exists():
            tree = read_json(self.folder / INDEX, self.folder, UsageError)
            names = tree.get("weight_map") if isinstance(tree, dict) else None
            if not isinstance(names, dict) or not names or not all(isinstance(n, str) for n in names.values()):
                raise UsageError(f"{self.folder / INDEX}: has no weight_map; fetch the file again")
            outside = [n for n in names.values() if not _is_weight_file(n)]
            if outside:
                raise UsageError(
                    f"{self.folder / INDEX}: names {outside[0]!r}, which is no safetensors file in its folder"
                )
            return [self.folder / n for n in sorted(set(names.values()))]
        if list(self.folder.glob("*.bin")):
            raise UsageError(
                f"{self.folder}: holds its weights as pickle (.bin), which can run code and is not read; convert it "
                "with transformers: `AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(OTHER)`"
            )
        return [self.folder / WEIGHTS]

    def _refuse_other_tensors(self, expected: dict[str, tuple[int, ...]], tied: bool) -> None:
        found = {name: t.shape for name, t in self._stored.items() if not name.endswith(_COMPUTED)}
        if tied and found.get(_HEAD) == found.get(_EMBEDDING) == expected[_EMBEDDING]:
            del found[_HEAD]
            pairs = zip(self._parts(_HEAD), self._parts(_EMBEDDING), strict=True)
            if not all(torch.equal(head, embedding) for head, embedding in pairs):
                raise UsageError(f"{self.folder}: {_HEAD} differs from {_EMBEDDING}, and config.json says they are one")
        problems = other_tensors(expected, found, "config.json")
        if problems:
            raise UsageError(listing(f"{self.folder}: the weights are not those of config.json:", problems))

    def _slice(self, name: str) -> Any:
        file = self._stored[name].file
        try:
            if file not in self._open_files:
                self._open_files[file] = safe_open(file, framework="pt")
            return self._open_files[file].get_slice(name)
        except SafetensorError as error:  # it checks more than our reading of the header
            raise UsageError(f"{file}: cannot be read ({error}); fetch the file again") from error

    def _parts(self, name: str) -> Iterator[Tensor]:
        """Yields a stored tensor in groups of rows."""
        shape = self._stored[name].shape
        rows = max(1, _AT_ONCE // max(1, math.prod(shape[1:])))
        source = self._slice(name)
        yield from (source[first : first + rows] for first in range(0, shape[0] if shape else 0, rows))


def _is_weight_file(name: str) -> bool:
    return name.endswith(".safetensors") and Path(name).name == name and name.isprintable()


def _refuse_other_model(folder: Path, found: ModelConfig, model: ModelConfig) -> None:
    resolved = ({**m.model_dump(), "num_kv_heads": m.kv_heads, "head_dim": m.head_size} for m in (found, model))
    theirs, ours = resolved
    problems = [
        f"model.{key}: {theirs[key]!r} in the folder, {ours[key]!r} in the config"
        for key in theirs
        if theirs[key] != ours[key] and key not in ("context_length", "document_mask")  # the weights fit any of both
    ]
    if problems:
        raise UsageError(
            listing(f"{folder}: is not the model of the config:", problems, "Set the section `model` to it.")
        )
