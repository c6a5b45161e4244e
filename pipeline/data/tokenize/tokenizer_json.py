"""The Hugging Face `tokenizer.json` as data: composed from a vocabulary, checked, and changed for encoding."""

from __future__ import annotations

import itertools
import json
import secrets
from collections.abc import Sequence
from typing import Any, Literal

from pipeline.text_format import byte_characters

SplitPattern = Literal["gpt2", "gpt4"]

# The pattern of GPT-4 (cl100k_base), also used by Llama 3.
GPT4_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# What published tokenizers call the token between documents, the likeliest name first.
KNOWN_ENDS = ("<|endoftext|>", "<|end_of_text|>", "<|end▁of▁sentence|>", "</s>", "<eos>", "<|eot|>", "[EOS]")


def compose(
    vocabulary: Sequence[bytes],
    merges: Sequence[tuple[bytes, bytes]],
    special_tokens: Sequence[str],
    split_pattern: SplitPattern,
) -> str:
    """Returns the text of a byte-level BPE's tokenizer.json.

    Args:
        vocabulary: Bytes of each token, by id.
        merges: Pairs in the order in which they are merged.
        special_tokens: They get the ids after the vocabulary.
        split_pattern: How text is split before merging.
    """
    characters = byte_characters()

    def spelled(token: bytes) -> str:
        return "".join(characters[b] for b in token)

    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {
                    "id": len(vocabulary) + i,
                    "content": token,
                    **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
                    "special": True,
                }
                for i, token in enumerate(special_tokens)
            ],
            "normalizer": None,
            "pre_tokenizer": pre_tokenizer(split_pattern),
            "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": {spelled(token): i for i, token in enumerate(vocabulary)},
                "merges": [[spelled(a), spelled(b)] for a, b in merges],
            },
        },
        ensure_ascii=False,
    )


def compose_bytes(special_tokens: Sequence[str]) -> str:
    """Returns the tokenizer.json with one token per byte, whose id is the byte."""
    return compose([bytes([b]) for b in range(256)], [], special_tokens, "gpt2")


def is_bytes(tree: dict[str, Any]) -> bool:
    """Returns whether a tokenizer.json is what `compose_bytes` writes."""
    model = tree["model"]
    return (
        model.get("type") == "BPE"
        and not model.get("merges")
        and model.get("vocab") == {c: b for b, c in enumerate(byte_characters())}
        and tree.get("normalizer") is None
    )


def special_tokens(tree: dict[str, Any]) -> dict[str, int]:
    """Returns the special tokens and their ids, sorted by id."""
    added = sorted(tree.get("added_tokens") or [], key=lambda token: token["id"])
    return {token["content"]: token["id"] for token in added if token.get("special")}


def vocabulary_size(tree: dict[str, Any]) -> int:
    """Returns one more than the largest token id."""
    vocab = tree["model"]["vocab"]
    ids = list(vocab.values()) if isinstance(vocab, dict) else list(range(len(vocab)))
    return max([*ids, *(token["id"] for token in tree.get("added_tokens") or [])]) + 1


def problem(tree: Any) -> str | None:
    """Returns why a parsed file is not a tokenizer.json; None if all that this program reads is as expected."""
    model = tree.get("model") if isinstance(tree, dict) else None
    if not isinstance(model, dict):
        return "it has no `model`"
    vocab, merges, added = model.get("vocab"), model.get("merges"), tree.get("added_tokens")
    if not (vocab and (_are_ids(vocab) or _are_scores(vocab))):
        return "`model.vocab` has neither ids of tokens nor tokens with scores"
    if not (merges is None or _are_merges(merges)):
        return "`model.merges` is not a list of pairs"
    if not isinstance(model.get("unk_token"), str | None):
        return "`model.unk_token` is not a token"
    if not (added is None or (isinstance(added, list) and all(_is_added(token) for token in added))):
        return "`added_tokens` is not a list of tokens with `id` and `content`"
    return None


def ordinary_text_only(tree: dict[str, Any]) -> dict[str, Any]:
    """Returns the same tokenizer for ordinary text: text that spells a special token is encoded like any other.

    Each special token gets a spelling that no document can guess. Not searching the text for special tokens is not
    enough, since models of words, of pieces and with `ignore_merges` have them in their vocabulary too. All ids stay
    as they are: if a token were removed, `tokenizers` would give its id to another.
    """
    secret = {token: f"<{secrets.token_hex(16)}>" for token in special_tokens(tree)}
    model, added = dict(tree["model"]), tree.get("added_tokens") or []
    vocab = model["vocab"]
    if isinstance(vocab, list):
        model["vocab"] = [[secret.get(token, token), score] for token, score in vocab]
    elif not secret.keys().isdisjoint(vocab.keys()):
        model["vocab"] = {secret.get(token, token): i for token, i in vocab.items()}
        if model.get("merges"):
            model["merges"] = [m for m in model["merges"] if secret.keys().isdisjoint(_spellings(m))]
    if model.get("unk_token") in secret:
        model["unk_token"] = secret[model["unk_token"]]
    added = [{**token, "content": secret.get(token["content"], token["content"])} for token in added]
    return {**tree, "added_tokens": added, "post_processor": None, "truncation": None, "padding": None, "model": model}


def without_added_tokens(tree: dict[str, Any]) -> dict[str, Any]:
    """Returns the same tokenizer as training used it: nothing is added to a text, and none is cut or padded."""
    kept = None if _adds_tokens(tree.get("post_processor")) else tree.get("post_processor")
    return {**tree, "post_processor": kept, "truncation": None, "padding": None}


def _adds_tokens(post_processor: Any) -> bool:
    """Whether a post-processor adds special tokens around a text; `ByteLevel`, for one, only moves offsets."""
    if not isinstance(post_processor, dict):
        return False
    parts = post_processor.get("processors")
    if isinstance(parts, list):
        return any(_adds_tokens(part) for part in parts)
    return post_processor.get("type") != "ByteLevel"


def end_of_text(tree: dict[str, Any], wanted: str | None = None) -> str | None:
    """Returns the token that ends a document: `wanted`, or by default the likeliest; None if there is none."""
    special = special_tokens(tree)
    if wanted is not None:
        return wanted if wanted in special else None
    return next((t for t in (*KNOWN_ENDS, *special) if t in special), None)


def pre_tokenizer(split_pattern: SplitPattern) -> dict[str, Any]:
    """Returns the section of a trained BPE that splits text before merging."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    if split_pattern == "gpt2":
        return {**byte_level, "use_regex": True}
    split = {"type": "Split", "pattern": {"Regex": GPT4_PATTERN}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, {**byte_level, "use_regex": False}]}


def _are_ids(vocab: Any) -> bool:
    # By sets, as for merges: a call for each of 100,000 entries takes ten times as long.
    return isinstance(vocab, dict) and set(map(type, vocab.values())) == {int} and min(vocab.values()) >= 0


def _are_scores(vocab: Any) -> bool:
    return isinstance(vocab, list) and all(
        isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str) and isinstance(entry[1], int | float)
        for entry in vocab
    )


def _is_id(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_added(token: Any) -> bool:
    return isinstance(token, dict) and isinstance(token.get("content"), str) and _is_id(token.get("id"))


def _are_merges(merges: Any) -> bool:
    """Returns whether each merge is `"a b"`, or `["a", "b"]` as in newer files."""
    if not isinstance(merges, list):
        return False
    pairs = _pairs(merges)
    if set(map(type, pairs)) - {list} or set(map(len, pairs)) - {2}:
        return False
    return set(map(type, itertools.chain.from_iterable(pairs))) <= {str}


def _pairs(merges: Sequence[str | list[str]]) -> list[list[str]]:
    return [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges]


def _spellings(merge: str | list[str]) -> tuple[str, str, str]:
    """Returns the two tokens of a merge and the one that it makes."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right, left + right
