"""The peers of benchmarks/prepare.py: what a user of other tools runs instead of `pipeline prepare`, one process each.

`encode tokenizers|tiktoken|gigatoken TEXT TOKENIZER OUT` or `train pipeline|tokenizers|rustbpe TEXT MEGABYTES OUT`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.corpus import SEPARATOR

VOCAB_SIZE = 32_000
END_OF_TEXT = "<|endoftext|>"
_BATCH_CHARACTERS = 8 << 20
_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

Encode = Callable[[list[str]], list[list[int]]]


def encode(name: str, text: str, tokenizer: str, out: str) -> None:
    """Reads, encodes on all cores and writes the tokens, without index, digests, checks or split."""
    if name == "gigatoken":
        _encode_file(text, tokenizer, out)
    else:
        by = {"tokenizers": _by_tokenizers, "tiktoken": _by_tiktoken}[name]
        _encode_in_batches(by(tokenizer), text, tokenizer, out)


def _encode_in_batches(encode_batch: Encode, text: str, tokenizer: str, out: str) -> None:
    import numpy as np

    documents = Path(text).read_bytes().decode().split(SEPARATOR)[:-1]
    end = _end_of_text_id(tokenizer)
    pieces = []
    for batch in _batches(documents):
        for ids in encode_batch(batch):
            ids.append(end)
            pieces.append(np.array(ids, np.uint16))
    tokens = np.memmap(out, np.uint16, "w+", shape=(sum(map(len, pieces)),))
    np.concatenate(pieces, out=tokens)
    tokens.flush()


def _encode_file(text: str, tokenizer: str, out: str) -> None:
    """The encoder of `pipeline prepare` by itself: it reads the file too, and holds all of its ids."""
    import numpy as np
    from gigatoken.gigatoken_rs import TextFileSource, load_hf_json

    encoded = load_hf_json(Path(tokenizer).read_text()).encode_files(TextFileSource([text], SEPARATOR)).layout
    ids, ends = np.asarray(encoded.content.data), np.asarray(encoded.offsets.data)[1:]
    tokens = np.empty(len(ids) + len(ends), np.uint16)
    begin = 0
    for number, end in enumerate(ends.tolist()):
        tokens[begin + number : end + number] = ids[begin:end]
        begin = end
    tokens[ends + np.arange(len(ends))] = _end_of_text_id(tokenizer)
    tokens.tofile(out)  # cheaper than a memmap


def _end_of_text_id(tokenizer: str) -> int:
    return int(json.loads(Path(tokenizer).read_text())["added_tokens"][0]["id"])


def _by_tokenizers(tokenizer: str) -> Encode:
    import tokenizers

    fast = tokenizers.Tokenizer.from_file(tokenizer)
    return lambda batch: [e.ids for e in fast.encode_batch_fast(batch)]


def _by_tiktoken(tokenizer: str) -> Encode:
    import tiktoken

    ranks = _ranks(tokenizer)
    encoding = tiktoken.Encoding("own", pat_str=_GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
    return lambda batch: encoding.encode_ordinary_batch(batch, num_threads=os.cpu_count() or 1)


def _ranks(tokenizer: str) -> dict[bytes, int]:
    """Returns the vocabulary in tiktoken's form; the ids already follow the order of the merges."""
    from pipeline.text_format import byte_characters

    byte_of = {c: b for b, c in enumerate(byte_characters())}
    vocab = json.loads(Path(tokenizer).read_text())["model"]["vocab"]
    return {bytes(byte_of[c] for c in token): i for token, i in vocab.items()}


def _batches(documents: list[str]) -> list[list[str]]:
    made: list[list[str]] = [[]]
    size = 0
    for document in documents:
        made[-1].append(document)
        size += len(document)
        if size >= _BATCH_CHARACTERS:
            made.append([])
            size = 0
    return made


def train(name: str, text: str, megabytes: str, out: str) -> None:
    """Trains a BPE on the first megabytes of a text; writes the pipeline's to `out`."""
    with Path(text).open("rb") as source:
        content = source.read(int(megabytes) * 10**6)
    content = content[: content.rindex(SEPARATOR.encode())]
    if name == "pipeline":
        from pipeline.data.tokenize.train import train_bpe

        made = train_bpe(content, SEPARATOR.encode(), VOCAB_SIZE, [END_OF_TEXT], "gpt2")
        Path(out).write_text(made, encoding="utf-8")
        return
    documents = content.decode().split(SEPARATOR)
    if name == "rustbpe":
        import rustbpe

        pattern = _GPT2_PATTERN.replace("++", "+").replace(r"|\s+$", "")
        rustbpe.Tokenizer().train_from_iterator(iter(documents), VOCAB_SIZE - 1, pattern=pattern)
        return
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    blank = tokenizers.Tokenizer(models.BPE())
    blank.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE - 1, initial_alphabet=alphabet, show_progress=False)
    blank.train_from_iterator(documents, trainer)


if __name__ == "__main__":
    {"encode": encode, "train": train}[sys.argv[1]](*sys.argv[2:])
