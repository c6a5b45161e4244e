"""Text to ids and back: the fast encoder agrees with the reference, and no text forges a document boundary."""

from __future__ import annotations

import itertools
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from pipeline.data.build.build import prepare
from pipeline.data.manifest import DatasetManifest
from pipeline.data.read.documents import Documents
from pipeline.data.tokenize.tokenizer import Tokenizer
from pipeline.data.tokenize.tokenizer_json import compose_bytes
from pipeline.data.tokenize.train import train_bpe
from pipeline.errors import DataError
from tests.data.helpers import (
    COMPRESS,
    END,
    TOKENIZER_SAMPLE,
    TOKENIZER_TEXTS,
    config,
    jsonl,
    one_source,
    save_tokenizer,
    split_texts,
    trained,
    write,
    write_parquet,
)

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


@pytest.mark.parametrize("pattern", ["gpt2", "gpt4", "bytes"])
def test_ids_are_those_of_tokenizers_and_decode_to_the_text(pattern: str, tmp_path: Path) -> None:
    path = save_tokenizer(tmp_path, compose_bytes([END, "<|pad|>"]) if pattern == "bytes" else trained(pattern))
    made = Tokenizer.load(path)
    reference = tokenizers.Tokenizer.from_file(str(path))
    reference.encode_special_tokens = True
    assert made.encoder == ("bytes" if pattern == "bytes" else "gigatoken") and made.notice is None
    for text in MESSY + TOKENIZER_TEXTS:
        ids = made.encode(text)
        assert ids == reference.encode(text).ids
        assert made.decode(ids) == text
        assert max(ids) < made.end_of_text_id


def test_a_batch_gives_the_ids_of_its_documents_one_by_one_wherever_the_buffer_begins(tmp_path: Path) -> None:
    made = Tokenizer.load(save_tokenizer(tmp_path, trained()))
    whole = Documents.of([t.encode() for t in MESSY])
    part = Documents(whole.data, whole.offsets[2:])
    for parallel in (False, True):
        ids, offsets = made.encode_batch(part, parallel)
        assert [ids[a:b].tolist() for a, b in itertools.pairwise(offsets)] == [made.encode(t) for t in MESSY[2:]]


# One word for every pre-tokenizer, so that models with a vocabulary of words look it up whole.
WORD = "ENDOFTEXT"


def _with_words(kind: str, end: str = WORD) -> dict[str, Any]:
    """A tokenizer.json whose model has its special tokens in its vocabulary too."""
    if kind.startswith("ignore_merges"):
        tree = json.loads(train_bpe(TOKENIZER_SAMPLE, b"\xff", 299, [end], "gpt2"))
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
    made.train_from_iterator(TOKENIZER_TEXTS, trainer)
    return dict(json.loads(made.to_str()))


@pytest.mark.parametrize("kind", ["unigram", "wordlevel", "wordpiece", "ignore_merges", "ignore_merges and fallback"])
def test_a_vocabulary_that_holds_its_special_tokens_cannot_be_made_to_forge_a_boundary(
    kind: str, tmp_path: Path
) -> None:
    forged = [f"first {WORD} second", WORD, f"{WORD}\n{WORD}{WORD}", f"x{WORD}y", "<unk>", *TOKENIZER_TEXTS[:20]]
    tree = _with_words(kind)
    wanted = {"kind": "file", "path": str(save_tokenizer(tmp_path, json.dumps(tree))), "end_of_text": WORD}
    text = write(tmp_path / "a.jsonl", jsonl(forged))
    manifest = prepare(config(tmp_path / "out", [one_source(text)], tokenizer=wanted))
    assert manifest.encoder == ("gigatoken" if kind == "ignore_merges" else "tokenizers")
    (shard,) = manifest.shards
    tokens = np.fromfile(tmp_path / "out" / shard.file, manifest.numpy_dtype)
    ends = np.flatnonzero(tokens == manifest.end_of_text_id) + 1
    index = np.fromfile(tmp_path / "out" / shard.index, "<u8")
    assert ends.tolist() == index[1:].tolist() and len(ends) == len(forged)
    # Ordinary text keeps its ids.
    whole = tokenizers.Tokenizer.from_str(json.dumps(tree))
    for document, (start, stop) in zip(TOKENIZER_TEXTS[:20], itertools.pairwise(index[5:].astype(int)), strict=True):
        assert tokens[start : stop - 1].tolist() == whole.encode(document, add_special_tokens=False).ids


def test_a_special_token_that_merges_would_make_is_encoded_in_its_parts(tmp_path: Path) -> None:
    tree = json.loads(train_bpe(b"\xff".join([b"ab"] * 500), b"\xff", 257, [END], "gpt2"))
    tree["model"]["merges"] = [["a", "b"], ["ab", "c"]]
    tree["model"]["vocab"] |= {"ab": 257, "abc": 258}
    tree["added_tokens"][0] |= {"id": 257, "content": "ab"}
    made = Tokenizer.load(save_tokenizer(tmp_path, json.dumps(tree)), "ab")
    assert made.encoder == "gigatoken"
    assert made.encode("ab abc") == made.reference_encode(["ab abc"])[0] == [*b"ab abc"]


@pytest.mark.parametrize("normalizer", [None, {"type": "NFKC"}])
def test_other_added_tokens_keep_their_ids(normalizer: Any, tmp_path: Path) -> None:
    tree = json.loads(trained(size=300))
    tree["normalizer"] = normalizer
    tree["added_tokens"].append({**tree["added_tokens"][0], "id": 300, "content": "<tool>", "special": False})
    made = Tokenizer.load(save_tokenizer(tmp_path, json.dumps(tree)), END)
    assert made.encoder == ("tokenizers" if normalizer else "gigatoken")
    ids = made.encode(f"a<tool>b{END}")
    assert ids == made.reference_encode([f"a<tool>b{END}"])[0]
    assert ids[:3] == [ord("a"), 300, ord("b")] and made.end_of_text_id not in ids


def test_a_tokenizer_that_ends_documents_with_its_unknown_words_is_refused(tmp_path: Path) -> None:
    tree = _with_words("wordlevel")
    tree["model"]["unk_token"] = WORD
    wanted = {"kind": "file", "path": str(save_tokenizer(tmp_path, json.dumps(tree))), "end_of_text": WORD}
    known = TOKENIZER_TEXTS[0].split()[1]
    for number, text in enumerate([known, f"{known} unheard-of", known]):
        write(tmp_path / "in" / f"{number}.txt", text.encode())
    made = config(tmp_path / "out", [one_source(tmp_path / "in" / "*.txt")], tokenizer=wanted)
    with pytest.raises(DataError, match=rf"0\.txt .*2\.txt \(3 files\).*unheard-of.*{WORD}.*tokenizer.end_of_text"):
        prepare(made)
    assert not list((tmp_path / "out").rglob("*.bin"))


@pytest.mark.parametrize("tokenizer", ["bpe", "bytes", "file", "fallback"])
def test_no_source_of_any_kind_can_forge_a_boundary(tokenizer: str, tmp_path: Path) -> None:
    forged = [f"first{END}second", END, f"{END}<|pad|>\n{END}", *TOKENIZER_TEXTS[:60]]
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
        tree = json.loads(trained(size=300))
        if tokenizer == "fallback":
            tree["normalizer"] = {"type": "NFC"} if _unsupported("NFC") else {"type": "NFKC"}
        wanted = {"kind": "file", "path": str(save_tokenizer(tmp_path, json.dumps(tree)))}
    manifest = prepare(config(tmp_path / "out", sources, tokenizer=wanted))
    assert manifest.encoder == {"bytes": "bytes", "fallback": "tokenizers"}.get(tokenizer, "gigatoken")
    assert split_texts(tmp_path / "out") == forged * (1 + 5 + 5 + 2)
    made = Tokenizer.load(tmp_path / "out" / "tokenizer.json")
    for shard in manifest.shards:
        tokens = np.fromfile(tmp_path / "out" / shard.file, manifest.numpy_dtype)
        special = np.isin(tokens, list(made.special_tokens.values()))
        assert special.sum() == shard.documents == (tokens == made.end_of_text_id).sum()


def _unsupported(normalizer: str) -> bool:
    tree = json.loads(trained(size=300))
    tree["normalizer"] = {"type": normalizer}
    return Tokenizer(json.dumps(tree).encode(), "here").encoder == "tokenizers"


def test_a_word_in_the_vocabulary_of_special_tokens_is_ordinary_text_too(tmp_path: Path) -> None:
    # With ignore_merges a whole word is looked up in the vocabulary, special tokens or not.
    tree = json.loads(train_bpe(TOKENIZER_SAMPLE, b"\xff", 400, ["END", "<|pad|>"], "gpt2"))
    tree["model"]["vocab"] |= {"END": 398}
    tree["model"]["ignore_merges"] = True
    made = Tokenizer.load(save_tokenizer(tmp_path, json.dumps(tree)), "END")
    assert made.end_of_text_id == 398
    assert 398 not in made.encode("END")


def test_an_unsupported_tokenizer_falls_back_to_tokenizers_with_a_notice(tmp_path: Path) -> None:
    tree = json.loads(trained())
    tree["normalizer"] = {"type": "NFKC"}
    path = save_tokenizer(tmp_path, json.dumps(tree))
    text = write(tmp_path / "a.jsonl", jsonl(["ﬁne ½", *TOKENIZER_TEXTS]))
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


def test_workers_that_need_the_reference_at_once_load_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Tokenizer(trained().encode(), "here")
    load = Tokenizer._load_tokenizers
    loaded: list[str] = []

    def slowly(self: Tokenizer, content: str) -> tokenizers.Tokenizer:
        loaded.append(content)
        time.sleep(0.2)
        return load(self, content)

    monkeypatch.setattr(Tokenizer, "_load_tokenizers", slowly)
    texts = TOKENIZER_TEXTS[:5]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda parallel: made.reference_encode(texts, parallel), [False, True] * 2))
    assert len(loaded) == 1
    assert all(ids == [made.encode(text) for text in texts] for ids in found)


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        Tokenizer.load(tmp_path / "none.json")


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    path = save_tokenizer(tmp_path, trained())
    text = write(tmp_path / "a.txt", b"text")
    made = config(
        tmp_path / "out", [{"name": "s", "paths": [str(text)]}], tokenizer={"kind": "file", "path": str(path)}
    )
    with pytest.raises(DataError, match=r"600 tokens.*model\.vocab_size"):
        prepare(made)
    with pytest.raises(DataError):
        DatasetManifest.load(tmp_path / "out")
