"""Follows one loss from transformers to here and back: a small Llama of its Trainer, continued by `pipeline train`.

The loss after the Trainer's last step, the first validation here, and the loss of the exported folder in transformers
are on the same windows of the demo's validation text. Needs `pip install accelerate`, which the Trainer wants.

python -m benchmarks.open_weights
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.utils.data import IterableDataset

from benchmarks.harness import refuse_arguments, save
from pipeline.data.dataset import TokenStream, open_dataset
from pipeline.data.order.validation import ValidationWindows, validation_windows
from tests.experiment import demo_text, validations

ROOT = Path(__file__).parent.parent
STEPS, EVERY, BATCH, CONTEXT, RATE = 400, 100, 16, 128, 3e-3
SHAPE = {
    "vocab_size": 4096, "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": True, "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-5,
}  # fmt: skip


class Windows(IterableDataset[dict[str, Tensor]]):
    """Windows at random offsets of the training tokens, for the Trainer."""

    def __init__(self, tokens: TokenStream) -> None:
        self._tokens = tokens

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        draw = np.random.default_rng(0)
        while True:
            start = draw.integers(self._tokens.tokens - CONTEXT, size=1)
            ids = torch.from_numpy(self._tokens.gather(start, CONTEXT)[0].astype(np.int64))
            yield {"input_ids": ids, "labels": ids}


def pipeline(*arguments: object) -> None:
    """Runs a command in the folder of the measurement."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "pipeline", *map(str, arguments)], check=True, env=environment)


def loss_of(model: Any, windows: ValidationWindows) -> float:
    """Returns transformers' mean loss on the windows that a validation here looks at."""
    total, tokens = 0.0, 0
    for first in range(0, min(windows.count, 20 * BATCH), BATCH):
        x, y = windows.batch(first, min(first + BATCH, windows.count))
        with torch.no_grad():
            logits = model(x).logits.flatten(0, 1)
        total += float(torch.nn.functional.cross_entropy(logits, y.flatten(), reduction="sum"))
        tokens += y.numel()
    return total / tokens


def trained(windows: ValidationWindows, tokens: TokenStream, end_of_text: int) -> tuple[Any, list[float]]:
    """Returns a Llama that the Trainer trained, and its losses on the way."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, eos_token_id=end_of_text))
    losses: list[float] = []

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
            if state.global_step % EVERY == 0:
                losses.append(loss_of(model, windows))

    settings = transformers.TrainingArguments(
        "trainer", max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=RATE, warmup_steps=50,
        lr_scheduler_type="constant_with_warmup", weight_decay=0.1, adam_beta2=0.95, max_grad_norm=1.0,
        save_strategy="no", report_to=[], logging_steps=EVERY, use_cpu=True, seed=0, disable_tqdm=True,
    )  # fmt: skip
    transformers.Trainer(model, settings, train_dataset=Windows(tokens), callbacks=[Watch()]).train()
    return model.eval(), losses


def measure() -> dict[str, Any]:
    pipeline("prepare", ROOT / "configs/demo.yaml", "data.path=tokens", *_sources())
    (windows,) = validation_windows(open_dataset("tokens", "validation"), CONTEXT)
    data = open_dataset("tokens", "train")
    model, theirs = trained(windows, data.stream, data.manifest.end_of_text_id)
    model.save_pretrained("weights")
    Path("weights/tokenizer.json").write_bytes(Path("tokens/tokenizer.json").read_bytes())
    pipeline("new", "more.yaml", "--from", "hf:weights")
    pipeline("prepare", "more.yaml", *_sources())  # the same tokens, recorded as those of a tokenizer from a file
    settings = {
        "tracking.uri": "none", "train.max_iters": STEPS, "train.val_interval": EVERY,
        "optimizer.learning_rate": RATE / 3, "optimizer.min_learning_rate": RATE / 30,
        "optimizer.cosine_cycle_iters": STEPS,
    }  # fmt: skip
    pipeline("train", "more.yaml", *_sources(), *(f"{key}={value}" for key, value in settings.items()))
    ours = [loss for _step, loss in validations(Path("runs/more"))]
    pipeline("export", "runs/more", "--output", "exported")
    again = transformers.AutoModelForCausalLM.from_pretrained("exported").eval()
    return {
        "trainer, every 100 steps": theirs,
        "continued here, every 100 steps": ours,
        "the exported folder in transformers": loss_of(again, windows),
    }


def _sources() -> list[str]:
    return demo_text(ROOT / "data/demo/text")


def main() -> None:
    refuse_arguments(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        figures = measure()
        os.chdir(ROOT)
    save("open_weights", figures, "mean loss in nats per token on the same 20 batches of validation text")


if __name__ == "__main__":
    main()
