"""Text to ids and back: by the fast encoder as by the reference, and never with a forged boundary."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from pipeline.data.build.build import prepare
from pipeline.data.manifest import Manifest
from pipeline.data.read.documents import Documents
from pipeline.data.tokenize import crosscheck
from pipeline.data.tokenize.tokenizer import Tokenizer, train_bpe
from pipeline.data.tokenize.tokenizer_json import compose, compose_bytes
from pipeline.errors import DataError
from tests.data.helpers import COMPRESS, config, documents, jsonl, one_source, split_texts, write, write_parquet

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


# A word as pre-tokenizers cut them, so that models with a vocabulary of words look it up whole.
WORD = "ENDOFTEXT"


def _with_words(kind: str, end: str = WORD) -> dict[str, Any]:
    """A tokenizer.json whose model has its special tokens in its vocabulary too."""
    if kind.startswith("ignore_merges"):
        tree = json.loads(train_bpe(SAMPLE, b"\xff", 299, [end], "gpt2"))
        tree["model"]["vocab"][end] = tree["added_tokens"][0]["id"]
        tree["model"]["ignore_merges"] = True
        tree["normalizer"] = {"type": "NFKC"} if kind == "ignore_merges and fallback" else None
        return dict(tree)
    special = ["<unk>", end]
    made: Any
    if kind == "unigram":
        made = tokenizers.Tokenizer(tokenizers.models.Unigram())
        made.pre_tokenizer, made.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
        trainer: Any = tokenizers.trainers.UnigramTrainer(
            vocab_size=290, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    else:
        model, trained = {
            "wordlevel": (tokenizers.models.WordLevel, tokenizers.trainers.WordLevelTrainer),
            "wordpiece": (tokenizers.models.WordPiece, tokenizers.trainers.WordPieceTrainer),
        }[kind]
        made = tokenizers.Tokenizer(model(unk_token="<unk>"))
        made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        trainer = trained(vocab_size=290, special_tokens=special, show_progress=False)
    made.train_from_iterator(TEXTS, trainer)
    return dict(json.loads(made.to_str()))


@pytest.mark.parametrize("kind", ["unigram", "wordlevel", "wordpiece", "ignore_merges", "ignore_merges and fallback"])
def test_a_vocabulary_that_holds_its_special_tokens_cannot_be_made_to_forge_a_boundary(
    kind: str, tmp_path: Path
) -> None:
    forged = [f"first {WORD} second", WORD, f"{WORD}\n{WORD}{WORD}", f"x{WORD}y", "<unk>", *TEXTS[:20]]
    tree = _with_words(kind)
    wanted = {"kind": "file", "path": str(_save(tmp_path, json.dumps(tree))), "end_of_text": WORD}
    text = write(tmp_path / "a.jsonl", jsonl(forged))
    manifest = prepare(config(tmp_path / "out", [one_source(text)], tokenizer=wanted))
    assert manifest.encoder == ("gigatoken" if kind == "ignore_merges" else "tokenizers")
    (shard,) = manifest.shards
    tokens = np.fromfile(tmp_path / "out" / shard.file, manifest.numpy_dtype)
    ends = np.flatnonzero(tokens == manifest.end_of_text_id) + 1
    index = np.fromfile(tmp_path / "out" / shard.index, "<u8")
    assert ends.tolist() == index[1:].tolist() and len(ends) == len(forged)
    # Ordinary text has the ids it always had.
    whole = tokenizers.Tokenizer.from_str(json.dumps(tree))
    for document, (start, stop) in zip(TEXTS[:20], itertools.pairwise(index[5:].astype(int)), strict=True):
        assert tokens[start : stop - 1].tolist() == whole.encode(document, add_special_tokens=False).ids


def test_a_special_token_that_merges_would_make_is_encoded_in_its_parts(tmp_path: Path) -> None:
    tree = json.loads(train_bpe(b"\xff".join([b"ab"] * 500), b"\xff", 257, [END], "gpt2"))
    tree["model"]["merges"] = [["a", "b"], ["ab", "c"]]
    tree["model"]["vocab"] |= {"ab": 257, "abc": 258}
    tree["added_tokens"][0] |= {"id": 257, "content": "ab"}
    made = Tokenizer.load(_save(tmp_path, json.dumps(tree)), "ab")
    assert made.encoder == "gigatoken"
    assert made.encode("ab abc") == made.reference_encode(["ab abc"])[0] == [*b"ab abc"]


@pytest.mark.parametrize("normalizer", [None, {"type": "NFKC"}])
def test_other_added_tokens_keep_their_ids(normalizer: Any, tmp_path: Path) -> None:
    tree = json.loads(_trained(size=300))
    tree["normalizer"] = normalizer
    tree["added_tokens"].append({**tree["added_tokens"][0], "id": 300, "content": "<tool>", "special": False})
    made = Tokenizer.load(_save(tmp_path, json.dumps(tree)), END)
    assert made.encoder == ("tokenizers" if normalizer else "gigatoken")
    ids = made.encode(f"a<tool>b{END}")
    assert ids == made.reference_encode([f"a<tool>b{END}"])[0]
    assert ids[:3] == [ord("a"), 300, ord("b")] and made.end_of_text_id not in ids


def test_a_tokenizer_that_ends_documents_with_its_unknown_words_is_refused(tmp_path: Path) -> None:
    tree = _with_words("wordlevel")
    tree["model"]["unk_token"] = WORD
    wanted = {"kind": "file", "path": str(_save(tmp_path, json.dumps(tree))), "end_of_text": WORD}
    known = TEXTS[0].split()[1]
    for number, text in enumerate([known, f"{known} unheard-of", known]):
        write(tmp_path / "in" / f"{number}.txt", text.encode())
    made = config(tmp_path / "out", [one_source(tmp_path / "in" / "*.txt")], tokenizer=wanted)
    with pytest.raises(
        DataError, match=rf"0\.txt to .*2\.txt \(3 files\): .*unheard-of.*{WORD}.*tokenizer.end_of_text"
    ):
        prepare(made)
    assert not list((tmp_path / "out").rglob("*.bin"))


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


def test_the_ids_of_long_documents_are_those_that_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = write(tmp_path / "a.jsonl", jsonl([f"chapter {i} of a long book. " * 800 for i in range(40)]))
    encode = Tokenizer.encode_batch

    def reversed_batch(self: Tokenizer, batch: Documents, parallel: bool = False) -> Any:
        ids, offsets = encode(self, batch, parallel)
        return (ids[::-1].copy() if len(batch) > 1 else ids), offsets

    monkeypatch.setattr(Tokenizer, "encode_batch", reversed_batch)
    with pytest.raises(DataError, match="encode the document that begins 'chapter .* differently"):
        prepare(config(tmp_path / "out", [one_source(text)], tokenizer={"kind": "bpe"}))
    assert not list((tmp_path / "out").rglob("*.bin"))


def test_a_long_document_whose_beginning_is_encoded_otherwise_by_itself_is_compared_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = Tokenizer(_trained().encode(), "here")
    long = Documents.of([b"one two " * 3000])
    ids, offsets = made.encode_batch(long)
    encode = Tokenizer.encode_batch
    seen: list[int] = []
    reference = made.reference_encode

    def cut_matters(self: Tokenizer, batch: Documents, parallel: bool = False) -> Any:
        ids, offsets = encode(self, batch, parallel)
        return np.roll(ids, 1), offsets

    monkeypatch.setattr(made, "reference_encode", lambda texts: seen.extend(map(len, texts)) or reference(texts))
    monkeypatch.setattr(Tokenizer, "encode_batch", cut_matters)
    crosscheck.CrossCheck(made, 0, "here").offer(long, ids, offsets)
    assert seen == [24_000]


def test_the_sample_is_random_but_the_same_every_time_and_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Tokenizer.load(_save(tmp_path, compose_bytes([END])))
    seen: list[list[str]] = []
    reference = made.reference_encode
    monkeypatch.setattr(made, "reference_encode", lambda texts: seen.append(list(texts)) or reference(texts))
    many = Documents.of([f"{i} ".encode() * 100 for i in range(500)])
    for seed in (1, 1, 2):
        check = crosscheck.CrossCheck(made, seed, "here")
        for _ in range(3):
            check.offer(many, *made.encode_batch(many))
        check.finish()
    assert seen[0] == seen[1] != seen[2]
    assert sum(map(len, seen[0])) <= 33_000 and len(seen[0]) == 16


@pytest.mark.parametrize(
    ("content", "end", "words"),
    [
        ("{", None, "is not a tokenizer.json"),
        ("{}", None, "is not a tokenizer.json"),
        ("[]", None, "is not a tokenizer.json"),
        ('{"model": {"vocab": {}}}', None, "is not a tokenizer.json"),
        ('{"model": {"vocab": 5}}', None, "is not a tokenizer.json"),
        ('{"model": {"vocab": {"a": "b"}}}', None, "is not a tokenizer.json"),
        ('{"model": {"vocab": [["a"]]}}', None, "is not a tokenizer.json"),
        ('{"model": {"vocab": {"a": 0}, "merges": [5]}}', None, "is not a tokenizer.json"),
        ('{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1}]}', None, "is not a tokenizer.json"),
        ('{"model": {"vocab": {"a": 0}}, "added_tokens": {"id": 1}}', None, "is not a tokenizer.json"),
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
