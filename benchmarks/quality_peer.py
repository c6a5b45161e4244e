"""The peer of benchmarks/quality_peers.py: a tokenizer, tokens and a model by tokenizers and transformers' Trainer.

`python quality_peer.py FOLDER`: reads asked.json there and writes found.json.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(files: list[str], vocab: int) -> Tokenizer:
    """Byte-level BPE with GPT-2's pattern, as ours."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train(files, trainer)
    return tokenizer


def tokens_of(tokenizer: Tokenizer, files: list[str]) -> Tensor:
    """All documents in a row, each with an end."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    encoded = tokenizer.encode_batch([Path(file).read_text(encoding="utf-8") for file in files])
    return torch.tensor([token for each in encoded for token in (*each.ids, end)])


class Windows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows of the context's length and the token after each."""

    def __init__(self, parts: list[Tensor], context: int) -> None:
        rows = [part.unfold(0, context + 1, context) for part in parts]
        self.lengths = [len(part) for part in rows]
        self.rows = torch.cat(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.rows[index]
        return {"input_ids": row[:-1], "labels": row[1:], "shift_labels": row[1:]}


class Weighted(transformers.Trainer):
    """Draws rows by the weights of their parts."""

    def _get_train_sampler(self, *_: Any) -> Any:
        rows, share = self.train_dataset, self.share
        weights = [s / n for s, n in zip((share, 1 - share), rows.lengths, strict=True) for _ in range(n)]
        return torch.utils.data.WeightedRandomSampler(weights, len(rows) * 10, generator=torch.Generator())


def train(asked: dict[str, Any], folder: Path, rows: Windows) -> Any:
    """Qwen 3's shape is ours: Llama's with norms of queries and keys."""
    config = transformers.Qwen3Config(
        vocab_size=asked["vocab"], hidden_size=asked["width"], intermediate_size=asked["inner"],
        num_hidden_layers=asked["layers"], num_attention_heads=asked["heads"], num_key_value_heads=asked["heads"],
        head_dim=asked["width"] // asked["heads"], max_position_embeddings=asked["context"], tie_word_embeddings=False,
        initializer_range=asked["std"],
    )  # fmt: skip
    settings = transformers.TrainingArguments(
        str(folder / "trainer"), max_steps=asked["steps"], per_device_train_batch_size=asked["rows"],
        learning_rate=asked["rate"], warmup_steps=asked["warmup"], lr_scheduler_type="cosine",
        optim="adamw_torch_fused", weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95, max_grad_norm=1.0,
        save_strategy="no", report_to=[], logging_steps=20, use_cpu=True, disable_tqdm=True,
        bf16=asked["precision"] == "bf16", remove_unused_columns=False, seed=1337,
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(config)
    trainer = Weighted(model, settings, train_dataset=rows)
    trainer.share = asked["share"]
    trainer.train()
    return model.eval()


@torch.no_grad()
def bits_per_byte(model: Any, tokens: Tensor, context: int, size: int, low: bool) -> float:
    """Of windows of the context's length, each token predicted once."""
    total = 0.0
    ends = range(0, len(tokens) - 1, context)
    whole = [tokens[start : start + context + 1] for start in ends]
    for first in range(0, len(whole), 64):
        batch = torch.nn.utils.rnn.pad_sequence(whole[first : first + 64], batch_first=True, padding_value=-100)
        x, y = batch[:, :-1].clamp(min=0), batch[:, 1:]
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            logits = model(x, use_cache=False).logits
        total += F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="sum").item()
    return total / math.log(2) / size


def main(name: str) -> None:
    folder = Path(name)
    asked = json.loads((folder / "asked.json").read_text())
    tokenizer = train_tokenizer(asked["recent"] + asked["older"], asked["vocab"])
    rows = Windows([tokens_of(tokenizer, asked[part]) for part in ("recent", "older")], asked["context"])
    model = train(asked, folder, rows)
    size = sum(Path(file).stat().st_size for file in asked["held_back"])
    held_back = tokens_of(tokenizer, asked["held_back"])
    found = bits_per_byte(model, held_back, asked["context"], size, asked["precision"] == "bf16")
    (folder / "found.json").write_text(json.dumps({"bits_per_byte": found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
