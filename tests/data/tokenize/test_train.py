"""Training is deterministic, keeps to its size and merges nothing across documents."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import tokenizers

from pipeline.data.tokenize.tokenizer import Tokenizer
from pipeline.data.tokenize.tokenizer_json import compose, compose_bytes
from pipeline.data.tokenize.train import train_bpe
from tests.data.helpers import END, TOKENIZER_TEXTS, save_tokenizer, trained


def test_a_trained_vocabulary_has_exactly_its_size_with_special_tokens_last(tmp_path: Path) -> None:
    for pattern in ("gpt2", "gpt4"):
        made = Tokenizer.load(save_tokenizer(tmp_path, trained(pattern, 500)))
        assert made.vocab_size == 500
        assert made.special_tokens == {END: 498, "<|pad|>": 499}
        assert made.end_of_text_id == 498


def test_training_gives_the_same_file_every_time_and_agrees_with_hugging_face() -> None:
    assert trained() == trained()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=598, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    other = tokenizers.Tokenizer.from_str(compose([bytes([b]) for b in range(256)], [], [], "gpt2"))
    other.train_from_iterator(TOKENIZER_TEXTS, trainer)
    own = tokenizers.Tokenizer.from_str(trained())
    own.encode_special_tokens = True
    # Pairs that are equally frequent may be merged in another order; the lengths must hardly differ.
    own_tokens, other_tokens = (sum(len(t.encode(text).ids) for text in TOKENIZER_TEXTS) for t in (own, other))
    assert abs(own_tokens - other_tokens) < 0.005 * other_tokens


def test_nothing_is_merged_across_documents(tmp_path: Path) -> None:
    made = json.loads(train_bpe(b"\xff".join([b"ab"] * 500), b"\xff", 400, [END], "gpt2"))
    assert set(made["model"]["vocab"]) - set(json.loads(compose_bytes([END]))["model"]["vocab"]) == {"ab"}


def test_training_prints_nothing_and_leaves_stdout_and_stderr_as_they_were(capfd: pytest.CaptureFixture[str]) -> None:
    trained(size=300)
    os.write(1, b"out")
    os.write(2, b"err")
    assert tuple(capfd.readouterr()) == ("out", "err")
