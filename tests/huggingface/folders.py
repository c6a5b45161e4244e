"""Random models of every architecture, saved by transformers or written without it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pipeline.config.model_section import ModelConfig
from pipeline.huggingface.architectures import is_rotated, their_name, to_halves
from pipeline.huggingface.config_json import config_json, model_section
from pipeline.huggingface.model_folder import CONFIG, INDEX, TOKENIZER, WEIGHTS, shard_name
from pipeline.model.transformer import TransformerLM

_SMALL = {"vocab_size": 260, "intermediate_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 64}
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "SmolLM2": ("Llama", {
        "hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
    }),
    "TinyLlama": ("Llama", {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2}),
    "Llama-3.2": ("Llama", {
        "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": _LLAMA3,
    }),
    "Mistral": ("Mistral", {
        "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": None,
    }),
    "Qwen2.5": ("Qwen2", {
        "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    }),
    "Qwen3": ("Qwen3", {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24}),
}  # fmt: skip
"""The class and the config of a small model that is shaped like a published one."""


def transformers_model(name: str) -> Any:
    """Returns a random model of transformers; biases and gains are random too."""
    import transformers

    kind, settings = SHAPES[name]
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**_SMALL, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.mul_(4.0)
    return model.eval()


def saved_by_transformers(folder: Path, name: str, tokenizer: Path | None = None, **options: Any) -> Any:
    """Saves such a model as transformers does, with a tokenizer.json beside it; returns the model."""
    model = transformers_model(name)
    model.save_pretrained(folder, **options)
    (folder / TOKENIZER).write_bytes(tokenizer.read_bytes() if tokenizer else b"{}")
    return model


def described(folder: Path) -> ModelConfig:
    """Returns the model section of a folder."""
    return model_section(json.loads((folder / CONFIG).read_text()), str(folder / CONFIG))


def written(folder: Path, model: ModelConfig, files: int = 1, dtype: torch.dtype = torch.float32) -> TransformerLM:
    """Writes the folder of a random model without transformers; returns the model."""
    torch.manual_seed(0)
    ours = TransformerLM(**model.model_dump())
    tensors = {
        their_name(name): (to_halves(weight, model.head_size) if is_rotated(name) else weight).to(dtype).clone()
        for name, weight in ours.state_dict().items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    places = {name: shard_name(index % files + 1, files) for index, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: tensors[name] for name in names if places[name] == file}, folder / file, {"format": "pt"})
    if files > 1:
        (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    (folder / CONFIG).write_text(json.dumps(config_json(model, 0, str(dtype).removeprefix("torch."))))
    (folder / TOKENIZER).write_text("{}")
    ours.load_state_dict({name: weight.to(dtype).float() for name, weight in ours.state_dict().items()})
    return ours


def change_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Changes the tensors of a folder's only file."""
    tensors = load_file(folder / WEIGHTS)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
