"""A tokenizer.json that cannot be used is named with what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenizers

from pipeline.data.tokenize.tokenizer import Tokenizer
from pipeline.data.tokenize.tokenizer_json import compose, compose_bytes
from pipeline.errors import DataError
from tests.data.helpers import END, save_tokenizer


@pytest.mark.parametrize(
    ("content", "end", "words"),
    [
        ("{", None, "not a tokenizer.json"),
        ("{}", None, "not a tokenizer.json"),
        ("[]", None, "not a tokenizer.json"),
        ('{"model": {"vocab": {}}}', None, "not a tokenizer.json"),
        ('{"model": {"vocab": 5}}', None, "not a tokenizer.json"),
        ('{"model": {"vocab": {"a": "b"}}}', None, "not a tokenizer.json"),
        ('{"model": {"vocab": [["a"]]}}', None, "not a tokenizer.json"),
        ('{"model": {"vocab": {"a": 0}, "merges": [5]}}', None, "not a tokenizer.json"),
        ('{"model": {"vocab": {"a": 0}, "unk_token": ["a"]}}', None, "not a tokenizer.json"),
        ('{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1}]}', None, "not a tokenizer.json"),
        ('{"model": {"vocab": {"a": 0}}, "added_tokens": {"id": 1}}', None, "not a tokenizer.json"),
        (compose_bytes([]), None, "no special token"),
        (
            compose_bytes(["<|x|>"]),
            END,
            r"special token '<\|endoftext\|>'.*<\|x\|>.*tokenizer\.end_of_text",
        ),
    ],
)
def test_a_file_that_is_not_a_usable_tokenizer_is_named(
    content: str, end: str | None, words: str, tmp_path: Path
) -> None:
    path = save_tokenizer(tmp_path, content)
    with pytest.raises(DataError, match=words) as caught:
        Tokenizer.load(path, end)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "expected"), [("gpt2", ["it", "'s", "Ġ1234567"]), ("gpt4", ["it", "'s", "Ġ", "123", "456", "7"])]
)
def test_text_is_split_by_the_published_patterns(pattern: Any, expected: list[str]) -> None:
    made = tokenizers.Tokenizer.from_str(compose([bytes([b]) for b in range(256)], [], [], pattern))
    assert [piece for piece, _ in made.pre_tokenizer.pre_tokenize_str("it's 1234567")] == expected
