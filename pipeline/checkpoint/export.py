"""A checkpoint as plain weights: for our own model, as one safetensors file, and as a Hugging Face folder."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.checkpoint.layout import published, step_of
from pipeline.checkpoint.read import CheckpointReader, newest_checkpoint, verify
from pipeline.config.sections import Config, ModelConfig
from pipeline.data.tokenize.tokenizer import Tokenizer
from pipeline.errors import PipelineError, UsageError
from pipeline.files import fsync_dir, publish_dir, write_bytes, write_json
from pipeline.run.folder import Run, step_name

FORMATS = ("hf", "safetensors")

# Hugging Face's Llama is this transformer under other names.
_LLAMA_NAMES = (
    ("token_embeddings.", "model.embed_tokens."),
    ("ln_final.", "model.norm."),
    ("layers.", "model.layers."),
    (".attn.output_proj.", ".self_attn.o_proj."),
    (".attn.", ".self_attn."),
    (".ln1.", ".input_layernorm."),
    (".ln2.", ".post_attention_layernorm."),
    (".ffn.w1.", ".mlp.gate_proj."),
    (".ffn.w2.", ".mlp.down_proj."),
    (".ffn.w3.", ".mlp.up_proj."),
)
_RMS_NORM_EPS = 1e-5
_HF_FILES = frozenset(
    {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
)


def load_weights(folder: Path) -> dict[str, Tensor]:
    """The model's state dict, float32 on the CPU, by one process and without DeepSpeed, whoever wrote it."""
    reader = CheckpointReader(folder)
    weights = {name: reader.read_whole("weight", name) for name in reader.manifest.parameters}
    reader.close()
    return weights


def export_run(run: Run, form: str, step: int | None = None, output: Path | None = None) -> Path:
    """Writes the weights of a run for other programs.

    Args:
        run: The run.
        form: `hf` makes a folder that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`
            open, `safetensors` one file with our own names.
        step: Of the checkpoint; None takes the newest that is whole.
        output: The folder or file to make; by default one below the run's `export/`.

    Returns:
        What was written.

    Raises:
        UsageError: There is no such format, no checkpoint of this step, or `output` is something else already.
        CheckpointError: The checkpoint is damaged.
    """
    if form not in FORMATS:
        raise UsageError(f"--format {form}: allowed are {' and '.join(FORMATS)}")
    checkpoint = _checkpoint(run, step)
    if form == "safetensors":
        path = output or run.exports / f"{checkpoint.name}.safetensors"
        about = {"format": "pt", "step": str(step_of(checkpoint)), "model": run.config().model.model_dump_json()}
        _written(path, lambda: _write_file(path, checkpoint, about))
        return path
    folder = output or run.exports / f"{checkpoint.name}-hf"
    _written(folder, lambda: _write_hf(folder, run, checkpoint))
    return folder


def _checkpoint(run: Run, step: int | None) -> Path:
    if step is None:
        return newest_checkpoint(run.checkpoints)
    folder = run.checkpoints / step_name(step)
    if not folder.is_dir():
        there = ", ".join(str(step_of(f)) for f in reversed(published(run.checkpoints))) or "none"
        raise UsageError(f"{run.path}: has no checkpoint of step {step}; there are: {there}")
    verify(folder)
    return folder


def _written(path: Path, write: Callable[[], None]) -> None:
    try:
        write()
    except OSError as error:
        raise PipelineError(
            f"{path}: cannot be written ({error.strerror}); choose another place by --output"
        ) from error


def _write_file(path: Path, checkpoint: Path, about: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        _write_weights(temp, checkpoint, about)
        temp.replace(path)
        fsync_dir(path.parent)
    finally:
        temp.unlink(missing_ok=True)


def _write_weights(
    path: Path,
    checkpoint: Path,
    about: dict[str, str],
    rename: Callable[[str], str] = lambda name: name,
    reorder: Callable[[str, Tensor], Tensor] = lambda name, weight: weight,
) -> None:
    """A safetensors file of float32 weights, one parameter in memory at a time."""
    reader = CheckpointReader(checkpoint)
    header: dict[str, Any] = {"__metadata__": about}
    end = 0
    for name, entry in reader.manifest.parameters.items():
        start, end = end, end + 4 * math.prod(entry["shape"])
        header[rename(name)] = {"dtype": "F32", "shape": entry["shape"], "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format aligns the data to 8 bytes
    with path.open("wb") as out:
        out.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in reader.manifest.parameters:
            out.write(reorder(name, reader.read_whole("weight", name)).contiguous().numpy().astype("<f4").data)
        out.flush()
        os.fsync(out.fileno())
    reader.close()


# ---- Hugging Face ----------------------------------------------------------------------------


def _write_hf(folder: Path, run: Run, checkpoint: Path) -> None:
    config = run.config()
    _check_replaceable(folder)
    tokenizer = Tokenizer.load(run.tokenizer_file, config.tokenizer.end_of_text)
    temp = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    temp.mkdir(parents=True)
    try:
        _write_weights(
            temp / "model.safetensors",
            checkpoint,
            {"format": "pt", "step": str(step_of(checkpoint))},
            rename=_llama_name,
            reorder=lambda name, weight: _llama_order(name, weight, config.model),
        )
        write_bytes(temp / "tokenizer.json", tokenizer.content)
        write_json(temp / "config.json", _llama_config(config, tokenizer))
        write_json(temp / "generation_config.json", _generation_config(config, tokenizer))
        write_json(temp / "tokenizer_config.json", _tokenizer_config(config, tokenizer))
        if folder.exists():  # an earlier export; a rename replaces an empty folder only
            shutil.rmtree(folder)
        publish_dir(temp, folder)
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def _check_replaceable(folder: Path) -> None:
    """Refuses a place where anything lies but an earlier export: it would be deleted."""
    if not folder.exists():
        return
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    if names and (names != _HF_FILES or not _is_ours(folder / "model.safetensors")):
        others = f" ({', '.join(sorted(names - _HF_FILES)[:3])})" if names - _HF_FILES else ""
        raise UsageError(
            f"{folder}: exists and is no exported model of this program, or holds other files{others} too; "
            "choose another place by --output"
        )


def _is_ours(weights: Path) -> bool:
    """Whether it names the step it was exported from, which other programs' files do not."""
    try:
        with safe_open(weights, framework="pt") as file:
            return "step" in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def _llama_name(name: str) -> str:
    for ours, theirs in _LLAMA_NAMES:
        name = name.replace(ours, theirs)
    return name


def _llama_order(name: str, weight: Tensor, model: ModelConfig) -> Tensor:
    """Rows of q and k from adjacent pairs (2i, 2i + 1) to Llama's halves (i, i + d/2), which its RoPE rotates."""
    if not name.endswith((".q_proj.weight", ".k_proj.weight")):
        return weight
    return weight.unflatten(0, (model.num_heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def _llama_config(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    model = config.model
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.d_ff,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_heads,
        "head_dim": model.d_model // model.num_heads,
        "max_position_embeddings": model.context_length,
        "hidden_act": "silu",
        "rms_norm_eps": _RMS_NORM_EPS,
        # Under both names: transformers 5 reads the second, everything older the first.
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.end_of_text_id,
        "dtype": "float32",
        "torch_dtype": "float32",
    }


def _generation_config(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    sampled = config.sample.temperature > 0
    settings = {"temperature": config.sample.temperature, "top_p": config.sample.top_p} if sampled else {}
    return {"eos_token_id": tokenizer.end_of_text_id, "do_sample": sampled, **settings}


def _tokenizer_config(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.end_of_text,
        "model_max_length": config.model.context_length,
        # Otherwise decode() takes the blanks before punctuation away.
        "clean_up_tokenization_spaces": False,
    }
