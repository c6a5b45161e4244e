"""config.json in both directions: a model section from it, and it from a model section."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from pipeline.config.messages.values import refused
from pipeline.config.model_section import ModelConfig
from pipeline.config.section_base import wrong_value
from pipeline.errors import UsageError, listing
from pipeline.huggingface.architectures import ARCHITECTURES, Architecture, architecture_of

_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "max_position_embeddings")  # fmt: skip
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0, None),
    "partial_rotary_factor": (1, None),
}
"""Fields that change the numbers, with the values at which they are what this model computes."""
_HARMLESS = frozenset({
    "architectures", "model_type", "rope_theta", "rope_scaling", "rope_parameters", "sliding_window", "layer_types",
    "use_sliding_window", "max_window_layers", "initializer_range", "use_cache", "pretraining_tp", "dtype",
    "torch_dtype", "transformers_version", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id",
    "_name_or_path", "is_llama_config", "transformers.js_config", "return_dict", "id2label", "label2id",
    "chunk_size_feed_forward", "unsloth_fixed", "auto_map", "problem_type", "_attn_implementation_autoset",
})  # fmt: skip
"""Fields that are read below, or that change no number."""
_WINDOW = 4096  # what transformers takes for a sliding_window that is missing
_LARGEST = 1 << 31  # far beyond any size of a model, and still harmless to calculate with
_ROPE = frozenset({"rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor",
                   "original_max_position_embeddings"})  # fmt: skip


def model_section(tree: Any, place: str) -> ModelConfig:
    """Returns the model that a config.json describes.

    Args:
        tree: The content of the file.
        place: Names the file in messages.

    Raises:
        UsageError: The architecture is unknown, or a field changes the numbers in a way that this model cannot.
    """
    found = _architecture(tree, place)
    problems = list(_problems(tree, found))
    rope: dict[str, Any] = {}
    for field in ("rope_scaling", "rope_parameters"):
        given = tree.get(field) or {}
        if not isinstance(given, dict):
            problems.append(f"{field}: {given!r}")
            continue
        rope |= given
    scaling, more = _rope_scaling(rope)
    problems += more
    if problems:
        raise UsageError(listing(f"{place}: this model computes something that `pipeline` does not:", problems))
    settings = {ours: tree[theirs] for theirs, ours in _FIELDS.items() if tree.get(theirs) is not None}
    # The defaults of transformers.
    settings = {"norm_eps": 1e-6, **settings, "rope_theta": rope.get("rope_theta", tree.get("rope_theta", 10000.0))}
    settings |= {"qkv_bias": found.qkv_bias, "qk_norm": found.qk_norm, "rope_scaling": scaling}
    try:
        return ModelConfig(**settings)
    except ValidationError as error:
        wrong = [wrong_value(".".join(map(str, e.place)), e.given, e.allowed) for e in refused(error.errors())]
        raise UsageError(listing(f"{place}: holds values that are not a model's:", wrong)) from error


def _architecture(tree: Any, place: str) -> Architecture:
    given = tree.get("architectures") if isinstance(tree, dict) else None
    names = [given[0]] if isinstance(given, list) and given else []
    for found in ARCHITECTURES:
        if names == [found.name] and tree.get("model_type", found.model_type) == found.model_type:
            return found
    known = ", ".join(found.name for found in ARCHITECTURES)
    raise UsageError(
        f"{place}: the architecture is {', '.join(map(str, names)) or 'not named'}; these can be read: {known}"
    )


def _problems(tree: dict[str, Any], found: Architecture) -> Iterator[str]:
    for field in (*_SIZES, *found.required):
        if tree.get(field) is None:
            yield f"{field}: is missing"
    for field in _FIELDS:
        if isinstance(size := tree.get(field), int) and size > _LARGEST:
            yield f"{field}: is larger than {_LARGEST:,}"
    for field, value in tree.items():
        if field in _NEUTRAL:
            if value not in _NEUTRAL[field]:
                yield f"{field}: {value!r}; only {_NEUTRAL[field][0]!r} can be read"
        elif field not in _HARMLESS and field not in _FIELDS and value not in (None, False):
            yield f"{field}: {value!r}; remove the field from a copy of the folder if it changes no number"
    window = tree.get("sliding_window", _WINDOW)
    uses_window = window is not None and (found.model_type == "mistral" or tree.get("use_sliding_window"))
    context = tree.get("max_position_embeddings")
    if uses_window and not (isinstance(window, int) and isinstance(context, int) and window >= context):
        given = repr(window) if "sliding_window" in tree else f"is missing, which means {window}"
        yield f"sliding_window: {given}; attention here has no window"
    layers = tree.get("layer_types") or []
    if not isinstance(layers, list) or any(kind != "full_attention" for kind in layers):
        yield "layer_types: only full_attention can be read"


def _rope_scaling(rope: dict[str, Any]) -> tuple[dict[str, Any] | None, list[str]]:
    problems = [f"rope_parameters.{key}: {value!r}" for key, value in rope.items() if key not in _ROPE and value]
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None, problems
    if kind == "linear":
        return {"kind": kind, "factor": rope.get("factor")}, problems
    if kind == "llama3":
        return {
            "kind": kind,
            "factor": rope.get("factor"),
            "low_frequency_factor": rope.get("low_freq_factor"),
            "high_frequency_factor": rope.get("high_freq_factor"),
            "original_context_length": rope.get("original_max_position_embeddings"),
        }, problems
    return None, [*problems, f"rope_type: {kind!r}; only default, linear and llama3 can be read"]


def config_json(model: ModelConfig, end_of_text_id: int, dtype: str) -> dict[str, Any]:
    """Returns the content of config.json for a model.

    Raises:
        UsageError: No architecture of Hugging Face computes what it computes.
    """
    architecture = architecture_of(model)
    values = {**model.model_dump(), "num_kv_heads": model.kv_heads, "head_dim": model.head_size}
    rope: dict[str, Any] = {"rope_type": "default"}
    if model.rope_scaling is not None:
        rope = {"rope_type": model.rope_scaling.kind, "factor": model.rope_scaling.factor}
        if model.rope_scaling.kind == "llama3":
            rope |= {
                "low_freq_factor": model.rope_scaling.low_frequency_factor,
                "high_freq_factor": model.rope_scaling.high_frequency_factor,
                "original_max_position_embeddings": model.rope_scaling.original_context_length,
            }
    return {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        **{theirs: values[ours] for theirs, ours in _FIELDS.items()},
        "hidden_act": "silu",
        # Under both names: transformers 5 reads the second, older versions the first and `rope_scaling`.
        "rope_theta": model.rope_theta,
        "rope_scaling": rope if model.rope_scaling is not None else None,
        "rope_parameters": {**rope, "rope_theta": model.rope_theta},
        "attention_bias": False,
        "mlp_bias": False,
        "use_sliding_window": False,
        "bos_token_id": None,
        "eos_token_id": end_of_text_id,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
