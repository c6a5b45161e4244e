"""The files of a Hugging Face model folder, and the JSON ones that do not depend on the architecture."""

from __future__ import annotations

import re
from typing import Any

from pipeline.config.sections import SampleConfig

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
_ALWAYS = frozenset({CONFIG, GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG})
_SHARD = re.compile(r"model-\d{5}-of-(\d{5})\.safetensors")


def shard_name(number: int, count: int) -> str:
    """Returns the name of one of `count` files of weights, from 1."""
    return WEIGHTS if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def weight_files(names: set[str]) -> list[str]:
    """Returns those of the names that are files of weights."""
    return sorted(name for name in names if name == WEIGHTS or _SHARD.fullmatch(name))


def is_whole(names: set[str]) -> bool:
    """Whether these are the names of all files of a model folder, and no others."""
    weights = weight_files(names)
    expected = {shard_name(number + 1, len(weights)) for number in range(len(weights))}
    return bool(weights) and names == _ALWAYS | expected | ({INDEX} if len(weights) > 1 else set())


def strange_names(names: set[str]) -> list[str]:
    """Returns those of the names that no model folder has."""
    return sorted(names - _ALWAYS - {INDEX} - set(weight_files(names)))


def generation_config(sample: SampleConfig, end_of_text_id: int) -> dict[str, Any]:
    """Returns the content of generation_config.json."""
    sampled = sample.temperature > 0
    settings = {"temperature": sample.temperature, "top_p": sample.top_p} if sampled else {}
    return {"eos_token_id": end_of_text_id, "do_sample": sampled, **settings}


def tokenizer_config(end_of_text: str, context_length: int) -> dict[str, Any]:
    """Returns the content of tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end_of_text,
        "model_max_length": context_length,
        # Otherwise decode() removes the spaces before punctuation.
        "clean_up_tokenization_spaces": False,
    }
