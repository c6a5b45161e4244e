"""A run's weights for other programs: as one safetensors file under our own names, or as a Hugging Face folder."""

from __future__ import annotations

import json
import secrets
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.checkpoint.layout import published, step_of
from pipeline.checkpoint.read import newest_checkpoint, verify
from pipeline.checkpoint.weights import shards, write_weights
from pipeline.config.model_section import ModelConfig
from pipeline.data.tokenize import tokenizer_json
from pipeline.data.tokenize.tokenizer import Tokenizer
from pipeline.errors import UsageError
from pipeline.files import fsync_dir, naming, staged_dir, write_bytes, write_json
from pipeline.huggingface import model_folder
from pipeline.huggingface.architectures import is_rotated, their_name, to_halves
from pipeline.huggingface.config_json import config_json
from pipeline.model.flops import num_parameters
from pipeline.run.folder import Run, step_name

FORMATS = ("hf", "safetensors")
DTYPES = ("float32", "bfloat16")
SHARD_BYTES = 5_000_000_000
"""The most that a file of a Hugging Face folder holds, unless one parameter alone is larger."""


def export_run(
    run: Run, form: str, step: int | None = None, output: Path | None = None, dtype: str = "float32"
) -> Path:
    """Writes the weights of a run for other programs and returns the folder or file.

    Args:
        run: The run.
        form: `hf` makes a folder that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`
            open, `safetensors` one file with our own names.
        step: Step of the checkpoint; None takes the newest that is whole.
        output: The folder or file to write; by default one in the run's `export/`.
        dtype: Of the weights: `float32`, as the checkpoint has them, or `bfloat16`.

    Raises:
        UsageError: The format or the dtype is unknown, the format has no such architecture, no checkpoint has this
            step, or `output` holds something else.
        CheckpointError: The checkpoint is damaged.
    """
    if form not in FORMATS:
        raise UsageError(f"--format {form}: allowed are {' and '.join(FORMATS)}")
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: allowed are {' and '.join(DTYPES)}")
    checkpoint = _checkpoint(run, step)
    path = output or run.exports / (
        f"{checkpoint.name}.safetensors" if form == "safetensors" else f"{checkpoint.name}-hf"
    )
    with naming(path, "cannot be written", "choose another place with --output"):
        if form == "safetensors":
            _write_file(path, run, checkpoint, dtype)
        else:
            _write_hugging_face(path, run, checkpoint, dtype)
    return path


def _checkpoint(run: Run, step: int | None) -> Path:
    if step is None:
        return newest_checkpoint(run.checkpoints)
    folder = run.checkpoints / step_name(step)
    if not folder.is_dir():
        there = ", ".join(str(step_of(f)) for f in reversed(published(run.checkpoints))) or "none"
        raise UsageError(f"{run.path}: has no checkpoint of step {step}; there are: {there}")
    verify(folder)
    return folder


def _metadata(checkpoint: Path) -> dict[str, str]:
    return {"format": "pt", "step": str(step_of(checkpoint))}


def _write_file(path: Path, run: Run, checkpoint: Path, dtype: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    metadata = {**_metadata(checkpoint), "model": run.config().model.model_dump_json()}
    try:
        write_weights(temp, checkpoint, metadata, dtype=getattr(torch, dtype))
        temp.replace(path)
        fsync_dir(path.parent)
    finally:
        temp.unlink(missing_ok=True)


def _write_hugging_face(folder: Path, run: Run, checkpoint: Path, dtype: str) -> None:
    config = run.config()
    model = config.model
    _check_replaceable(folder)
    tokenizer = Tokenizer.load(run.tokenizer_file, config.tokenizer.end_of_text, run.path)
    end = tokenizer.end_of_text_id
    described = config_json(model, end, dtype)
    with staged_dir(folder) as temp:
        _write_shards(temp, checkpoint, model, getattr(torch, dtype))
        write_bytes(temp / model_folder.TOKENIZER, _as_trained(tokenizer, run))
        write_json(temp / model_folder.CONFIG, described)
        write_json(temp / model_folder.GENERATION_CONFIG, model_folder.generation_config(config.sample, end))
        write_json(
            temp / model_folder.TOKENIZER_CONFIG,
            model_folder.tokenizer_config(tokenizer.end_of_text, model.context_length),
        )
        if folder.exists():  # an earlier export; a rename replaces only an empty folder
            shutil.rmtree(folder)


def _as_trained(tokenizer: Tokenizer, run: Run) -> bytes:
    """Returns the tokenizer.json for other programs, which encodes as training did; says so where it is changed."""
    given = json.loads(tokenizer.content)
    ours = tokenizer_json.without_added_tokens(given)
    changed = [name for name in ("post_processor", "truncation", "padding") if ours[name] != given.get(name)]
    if not changed:
        return tokenizer.content
    print(
        f"pipeline: {run.tokenizer_file}: the export leaves out its {', '.join(changed)}: training encoded every "
        "document without, and the model never saw, for one, a token at the beginning",
        file=sys.stderr,
    )
    return json.dumps(ours, ensure_ascii=False).encode()


def _write_shards(folder: Path, checkpoint: Path, model: ModelConfig, dtype: torch.dtype) -> None:
    def reordered(name: str, weight: Tensor) -> Tensor:
        return to_halves(weight, model.head_size) if is_rotated(name) else weight

    groups = shards(checkpoint, dtype, SHARD_BYTES)
    files = [model_folder.shard_name(number, len(groups)) for number in range(1, len(groups) + 1)]
    for file, names in zip(files, groups, strict=True):
        write_weights(folder / file, checkpoint, _metadata(checkpoint), their_name, reordered, dtype, names)
    if len(groups) > 1:
        places = {their_name(name): file for file, names in zip(files, groups, strict=True) for name in names}
        size = dtype.itemsize * num_parameters(model)
        write_json(folder / model_folder.INDEX, {"metadata": {"total_size": size}, "weight_map": places})


def _check_replaceable(folder: Path) -> None:
    """Rejects a place that holds anything but an earlier export: it would be deleted."""
    if not folder.exists():
        return
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    files = model_folder.weight_files(names)
    if names and not (model_folder.is_whole(names) and all(_is_ours(folder / file) for file in files)):
        strange = model_folder.strange_names(names)[:3]
        others = f" ({', '.join(strange)})" if strange else ""
        raise UsageError(
            f"{folder}: exists and is not a model exported by this program, or holds other files{others} too; "
            "choose another place with --output"
        )


def _is_ours(weights: Path) -> bool:
    """Whether the file names the step it was exported from, which other programs' files do not."""
    try:
        with safe_open(weights, framework="pt") as file:
            return "step" in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False
