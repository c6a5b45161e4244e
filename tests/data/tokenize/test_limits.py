"""A hostile tokenizer.json is refused by name in seconds, without harm to the process that was given it."""

from __future__ import annotations

import base64
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.tokenize import limits
from pipeline.data.tokenize.tokenizer import Tokenizer
from pipeline.errors import DataError
from tests.data.helpers import END, trained

BYTES = json.loads(trained())


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(parts)}


def split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def charsmap(size: int, trie: bytes, texts: bytes) -> dict[str, Any]:
    table = base64.b64encode(size.to_bytes(4, "little") + trie + texts).decode()
    return {"type": "Precompiled", "precompiled_charsmap": table}


HOSTILE: dict[str, dict[str, Any]] = {
    "growing normalizer": {"normalizer": sequence(*[replace({"String": "a"}, "a" * 100)] * 5)},
    "growing nested normalizers": {"normalizer": sequence(sequence(replace({"Regex": "."}, "x" * 40)))},
    "long text before every document": {"normalizer": {"type": "Prepend", "prepend": "x" * 10**6}},
    "table longer than the file": {"normalizer": charsmap(2**31, b"", b"")},
    "damaged table": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA////"}},
    "table of long texts": {"normalizer": charsmap(4, b"\0" * 4, b"x" * 10**5)},
    "huge id": {"model": {**BYTES["model"], "vocab": {**BYTES["model"]["vocab"], "z": 2**31}}},
    "huge id of an added token": {"added_tokens": [{**BYTES["added_tokens"][0], "id": 2**31}]},
    "exponential expression": {"pre_tokenizer": split("(a+)+$")},
    "exponential alternatives": {"pre_tokenizer": split("(x|xx)+y")},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_tokenizer_is_refused_by_name_in_seconds(case: str, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps({**BYTES, **HOSTILE[case]}))
    began = time.process_time()
    with pytest.raises(DataError, match=f"^{file}: "):
        Tokenizer.load(file)
    assert time.process_time() - began < 10


def model(**fields: Any) -> bytes:
    added = [{**BYTES["added_tokens"][0], "id": 3}]
    return json.dumps(
        {**BYTES, "added_tokens": added, "pre_tokenizer": None, "decoder": None, "model": fields}
    ).encode()


WITHOUT_UNK = {
    "WordLevel": {"type": "WordLevel", "vocab": {"a": 0, END: 3}, "unk_token": "<unk>"},
    "WordPiece": {"type": "WordPiece", "vocab": {"a": 0, END: 3}, "unk_token": "<unk>",
                  "continuing_subword_prefix": "##", "max_input_chars_per_word": 100},
    "Unigram": {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0], ["b", -1.0], ["c", -1.0], [END, 0.0]],
                "byte_fallback": False},
}  # fmt: skip


@pytest.mark.parametrize("kind", WITHOUT_UNK)
def test_a_character_without_a_token_is_an_error_that_names_the_tokenizer(kind: str) -> None:
    tokenizer = Tokenizer(model(**WITHOUT_UNK[kind]), "received.json")
    assert tokenizer.encode("a") == [0]
    with pytest.raises(DataError, match=r"^received\.json: "):
        tokenizer.encode("xyz")


def test_a_child_that_needs_too_much_time_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_WALL_S", 0.01)
    with pytest.raises(DataError, match=r"^slow\.json: "):
        limits.try_out(model(**WITHOUT_UNK["Unigram"]), "slow.json")


def test_our_own_tokenizers_need_no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "try_out", lambda *_: pytest.fail("tried out"))
    for pattern in ("gpt2", "gpt4"):
        assert Tokenizer(trained(pattern).encode(), "ours").encode("war and peace")


@pytest.mark.parametrize("kind", ["fifo", "device", "large"])
def test_a_file_that_is_no_plain_bounded_file_is_refused(kind: str, tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "tokenizer.json"
    {"fifo": lambda: os.mkfifo(file), "device": lambda: file.symlink_to("/dev/zero"),
     "large": lambda: file.write_text(trained())}[kind]()  # fmt: skip
    monkeypatch.setattr(limits, "LARGEST", 1000)
    with pytest.raises(DataError, match=f"^{file}: "):
        Tokenizer.load(file)
