"""Text to ids and back: by the fast encoder as by the reference, and never with a forged boundary."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from pipeline.data import crosscheck
from pipeline.data.build import prepare
from pipeline.data.manifest import Manifest
from pipeline.data.text import Documents
from pipeline.data.tokenizer import Tokenizer, train_bpe
from pipeline.data.tokenizer_json import compose, compose_bytes
from pipeline.errors import DataError
from tests.data.helpers import COMPRESS, config, documents, jsonl, split_texts, write, write_parquet

END = "<|endoftext|>"
TEXTS = documents(200, seed=11)
SAMPLE = b"\xff".join(t.encode() for t in TEXTS)
MESSY = [
    "plain",
    "  leading, trailing  ",
    "tabs\tand\r\nlines\n\n\n",
    "naïve Zürich 北京 नमस्ते שלום 🙂👨‍👩‍👧",
    "don't WE'LL it's 1234567 3.14 a_b::c(); \u2028 \x00 \ufeff",
    "e\u0301 against \u00e9",
    END,
    f"a{END}b {END}{END} <|pad|> <|endof text|> <|ENDOFTEXT|>",
]


def _save(tmp_path: Path, content: str) -> Path:
    return write(tmp_path / "tokenizer.json", content.encode())


def _trained(pattern: Any = "gpt2", size: int = 600) -> str:
    return train_bpe(SAMPLE, b"\xff", size, [END, "<|pad|>"], pattern)


@pytest.mark.parametrize("pattern", ["gpt2", "gpt4", "bytes"])
def test_ids_are_those_of_tokenizers_and_decode_to_the_text(pattern: str, tmp_path: Path) -> None:
    path = _save(tmp_path, compose_bytes([END, "<|pad|>"]) if pattern == "bytes" else _trained(pattern))
    made = Tokenizer.load(path)
    reference = tokenizers.Tokenizer.from_file(str(path))
    reference.encode_special_tokens = True
    assert made.encoder == ("bytes" if pattern == "bytes" else "gigatoken") and made.notice is None
    for text in MESSY + TEXTS:
        ids = made.encode(text)
        assert ids == reference.encode(text).ids
        assert made.decode(ids) == text
        assert max(ids) < made.end_of_text_id


def test_a_batch_is_the_documents_one_by_one_wherever_the_buffer_begins(tmp_path: Path) -> None:
    made = Tokenizer.load(_save(tmp_path, _trained()))
    whole = Documents.of([t.encode() for t in MESSY])
    part = Documents(whole.data, whole.offsets[2:])
    for parallel in (False, True):
        ids, offsets = made.encode_batch(part, parallel)
        assert [ids[a:b].tolist() for a, b in itertools.pairwise(offsets)] == [made.encode(t) for t in MESSY[2:]]


def test_a_trained_vocabulary_has_exactly_its_size_with_special_tokens_last(tmp_path: Path) -> None:
    for pattern in ("gpt2", "gpt4"):
        made = Tokenizer.load(_save(tmp_path, _trained(pattern, 500)))
        assert made.vocab_size == 500
        assert made.special_tokens == {END: 498, "<|pad|>": 499}
        assert made.end_of_text_id == 498


def test_training_gives_the_same_file_every_time_and_agrees_with_hugging_face() -> None:
    assert _trained() == _trained()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=598, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    other = tokenizers.Tokenizer.from_str(compose([bytes([b]) for b in range(256)], [], [], "gpt2"))
    other.train_from_iterator(TEXTS, trainer)
    own = tokenizers.Tokenizer.from_str(_trained())
    own.encode_special_tokens = True
    # Pairs that are equally frequent may be merged in another order; the lengths must hardly differ.
    own_tokens, other_tokens = (sum(len(t.encode(text).ids) for text in TEXTS) for t in (own, other))
    assert abs(own_tokens - other_tokens) < 0.005 * other_tokens


def test_nothing_is_merged_across_documents_or_from_a_special_token_that_is_forged(tmp_path: Path) -> None:
    made = json.loads(train_bpe(b"\xff".join([b"ab"] * 500), b"\xff", 400, [END], "gpt2"))
    assert set(made["model"]["vocab"]) - set(json.loads(compose_bytes([END]))["model"]["vocab"]) == {"ab"}


@pytest.mark.parametrize("tokenizer", ["bpe", "bytes", "file", "fallback"])
def test_no_source_of_any_kind_can_forge_a_boundary(tokenizer: str, tmp_path: Path) -> None:
    forged = [f"first{END}second", END, f"{END}<|pad|>\n{END}", *TEXTS[:60]]
    folder = tmp_path / "in"
    for i, text in enumerate(forged):
        write(folder / "whole" / f"{i:03d}.txt", text.encode())
    write(folder / "split.txt", "\x1e".join(forged).encode())
    write(folder / "lines.jsonl", jsonl(forged))
    write_parquet(folder / "rows.parquet", forged)
    for ending, pack in COMPRESS.items():
        write(folder / f"split.txt.{ending}", pack((folder / "split.txt").read_bytes()))
        write(folder / f"lines.jsonl.{ending}", pack((folder / "lines.jsonl").read_bytes()))
    write(folder / "rows.parquet.zst", COMPRESS["zst"]((folder / "rows.parquet").read_bytes()))
    kinds = {"whole": "whole/*.txt", "split": "split.txt*", "lines": "lines.jsonl*", "rows": "rows.parquet*"}
    sources = [
        {
            "name": name,
            "paths": [str(folder / paths)],
            "split": "train",
            **({"separator": "\x1e"} if name == "split" else {}),
        }
        for name, paths in kinds.items()
    ]
    wanted: dict[str, Any] = {"kind": tokenizer, "special_tokens": ["<|pad|>"]}
    if tokenizer in ("file", "fallback"):
        tree = json.loads(_trained(size=300))
        if tokenizer == "fallback":
            tree["normalizer"] = {"type": "NFC"} if _unsupported("NFC") else {"type": "NFKC"}
        wanted = {"kind": "file", "path": str(_save(tmp_path, json.dumps(tree)))}
    manifest = prepare(config(tmp_path / "out", sources, tokenizer=wanted))
    assert manifest.encoder == {"bytes": "bytes", "fallback": "tokenizers"}.get(tokenizer, "gigatoken")
    assert split_texts(tmp_path / "out") == forged * (1 + 5 + 5 + 2)
    made = Tokenizer.load(tmp_path / "out" / "tokenizer.json")
    for shard in manifest.shards:
        tokens = np.fromfile(tmp_path / "out" / shard.file, manifest.numpy_dtype)
        special = np.isin(tokens, list(made.special_tokens.values()))
        assert special.sum() == shard.documents == (tokens == made.end_of_text_id).sum()


def _unsupported(normalizer: str) -> bool:
    tree = json.loads(_trained(size=300))
    tree["normalizer"] = {"type": normalizer}
    return Tokenizer(json.dumps(tree).encode(), "here").encoder == "tokenizers"


def test_a_word_in_the_vocabulary_of_special_tokens_is_ordinary_text_too(tmp_path: Path) -> None:
    # With ignore_merges a whole word is looked up in the vocabulary, special tokens or not.
    tree = json.loads(train_bpe(SAMPLE, b"\xff", 400, ["END", "<|pad|>"], "gpt2"))
    tree["model"]["vocab"] |= {"END": 398}
    tree["model"]["ignore_merges"] = True
    made = Tokenizer.load(_save(tmp_path, json.dumps(tree)), "END")
    assert made.end_of_text_id == 398
    assert 398 not in made.encode("END")


def test_an_unsupported_tokenizer_falls_back_and_says_so(tmp_path: Path) -> None:
    tree = json.loads(_trained())
    tree["normalizer"] = {"type": "NFKC"}
    path = _save(tmp_path, json.dumps(tree))
    text = write(tmp_path / "a.jsonl", jsonl(["ﬁne ½", *TEXTS]))
    messages: list[str] = []
    made = config(
        tmp_path / "out",
        [{"name": "s", "paths": [str(text)], "split": "train"}],
        tokenizer={"kind": "file", "path": str(path)},
    )
    made = made.model_copy(update={"model": made.model.model_copy(update={"vocab_size": 600})})
    manifest = prepare(made, progress=lambda p: messages.append(p.message) if p.message else None)
    assert manifest.encoder == "tokenizers"
    assert len(messages) == 1 and "gigatoken does not support" in messages[0] and "NFKC" in messages[0]
    reference = tokenizers.Tokenizer.from_file(str(path))
    reference.encode_special_tokens = True
    assert Tokenizer.load(path).encode("ﬁne ½") == reference.encode("ﬁne ½").ids
    assert split_texts(tmp_path / "out")[0] == "fine 1⁄2"


def test_every_build_is_checked_against_tokenizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = write(tmp_path / "a.jsonl", jsonl(TEXTS))
    made = config(
        tmp_path / "out",
        [{"name": "s", "paths": [str(text)], "split": "train"}],
        tokenizer={"kind": "bpe"},
        slice_size_mb=0.01,
    )
    manifest = prepare(made)
    slices = [json.loads(p.read_text()) for p in (tmp_path / "out").rglob("slice.json")]
    assert len(slices) > 3 and all(s["cross_checked"] >= 5 for s in slices)
    assert manifest.sources[0]["cross_checked"] == sum(s["cross_checked"] for s in slices)

    def off_by_one(self: Tokenizer, texts: list[str]) -> list[list[int]]:
        return [[*range(len(t)), 7] for t in texts]

    monkeypatch.setattr(Tokenizer, "reference_encode", off_by_one)
    other = config(tmp_path / "other", made.model_dump()["data"]["sources"], tokenizer={"kind": "bpe"})
    with pytest.raises(DataError, match="gigatoken and tokenizers encode the document that begins .* differently"):
        prepare(other)
    assert not list((tmp_path / "other").rglob("*.bin"))


def test_the_sample_is_random_but_the_same_every_time_and_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Tokenizer.load(_save(tmp_path, compose_bytes([END])))
    seen: list[list[str]] = []
    reference = made.reference_encode
    monkeypatch.setattr(made, "reference_encode", lambda texts: seen.append(list(texts)) or reference(texts))
    many = Documents.of([f"{i} ".encode() * 100 for i in range(500)])
    for seed in (1, 1, 2):
        check = crosscheck.CrossCheck(made, seed)
        for _ in range(3):
            check.offer(many, *made.encode_batch(many))
        check.finish("here")
    assert seen[0] == seen[1] != seen[2]
    assert sum(map(len, seen[0])) <= 33_000 and len(seen[0]) == 16


@pytest.mark.parametrize(
    ("content", "end", "words"),
    [
        ("{", None, "is not a tokenizer.json"),
        ("{}", None, "is not a tokenizer.json"),
        (compose_bytes([]), None, "no special token"),
        (
            compose_bytes(["<|x|>"]),
            END,
            r"no special token '<\|endoftext\|>'; it has <\|x\|>: set tokenizer.end_of_text",
        ),
    ],
)
def test_a_file_that_is_no_usable_tokenizer_is_named(content: str, end: str | None, words: str, tmp_path: Path) -> None:
    path = _save(tmp_path, content)
    with pytest.raises(DataError, match=words) as caught:
        Tokenizer.load(path, end)
    assert str(path) in str(caught.value)


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        Tokenizer.load(tmp_path / "none.json")


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    path = _save(tmp_path, _trained())
    text = write(tmp_path / "a.txt", b"text")
    made = config(
        tmp_path / "out", [{"name": "s", "paths": [str(text)]}], tokenizer={"kind": "file", "path": str(path)}
    )
    with pytest.raises(DataError, match="has 600 tokens, model.vocab_size is 300; set it to 600 or more"):
        prepare(made)
    with pytest.raises(DataError):
        Manifest.load(tmp_path / "out")
