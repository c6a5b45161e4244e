"""The JSON files of an exported folder say how the run samples and tokenizes."""

from __future__ import annotations

from pipeline.config.sections import SampleConfig
from pipeline.huggingface.model_folder import generation_config, tokenizer_config


def test_generation_samples_like_the_config_and_takes_the_likeliest_token_at_temperature_zero() -> None:
    sampled = generation_config(SampleConfig(temperature=0.5, top_p=0.9), end_of_text_id=5)
    assert sampled == {"eos_token_id": 5, "do_sample": True, "temperature": 0.5, "top_p": 0.9}
    assert generation_config(SampleConfig(temperature=0), end_of_text_id=5) == {"eos_token_id": 5, "do_sample": False}


def test_decoding_keeps_the_spaces_before_punctuation() -> None:
    assert tokenizer_config("<|end|>", 32)["clean_up_tokenization_spaces"] is False
