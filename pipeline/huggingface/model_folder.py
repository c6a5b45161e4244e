"""The files of a Hugging Face model folder, and the JSON ones that do not depend on the architecture."""

from __future__ import annotations

from typing import Any

from pipeline.config.sections import SampleConfig

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
FILES = frozenset({CONFIG, GENERATION_CONFIG, WEIGHTS, TOKENIZER, TOKENIZER_CONFIG})


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
