"""The peers of benchmarks/train_peers.py: one training run of another library in one process, in their environment.

`python train_peer.py PEER FOLDER fp32|bf16 eager|compile OUT`: trains on the batches, and where the architecture is
ours from the weights, that `train_peers` wrote into the folder; writes losses, seconds per step and memory as JSON.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

BETAS, EPS, WEIGHT_DECAY, CLIP = (0.9, 0.95), 1e-8, 0.1, 1.0
"""What all of them train with; the learning rate warms up and then stays."""


class Recipe:
    """What the folder asks for."""

    def __init__(self, folder: Path, precision: str, compiled: bool) -> None:
        self.folder, self.precision, self.compiled = folder, precision, compiled
        self.settings: dict[str, Any] = json.loads((folder / "recipe.json").read_text())
        self.batches = torch.from_numpy(np.load(folder / "batches.npy").astype(np.int64))

    @property
    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Around forward."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast("cpu", torch.bfloat16)

    def rate(self, step: int) -> float:
        """Learning rate of a step, from 0."""
        highest: float = self.settings["learning_rate"]
        return highest * min(1.0, step / self.settings["warmup"])

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a step."""
        rows = self.batches[step]
        return rows[:, :-1], rows[:, 1:]


def optimizer_of(model: nn.Module) -> torch.optim.AdamW:
    """Returns PyTorch's fused AdamW, which decays matrices only."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=BETAS, eps=EPS, fused=True)


def step_by_step(recipe: Recipe, model: nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Any]:
    """The plainest loop that does the same work."""
    optimizer = optimizer_of(model)
    losses, seconds = [], []
    for step in range(len(recipe.batches)):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        x, y = recipe.batch(step)
        with recipe.autocast:
            loss = loss_of(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        seconds.append(time.perf_counter() - began)
    return {"losses": losses, "seconds": seconds}


def transformers_step(recipe: Recipe) -> dict[str, Any]:
    """transformers' Llama in the plainest loop."""
    import transformers

    model = transformers.LlamaForCausalLM.from_pretrained(recipe.folder / "weights", attn_implementation="sdpa").train()
    called = torch.compile(model) if recipe.compiled else model

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(called(x, use_cache=False).logits.float().flatten(0, 1), y.flatten())

    return step_by_step(recipe, model, loss_of)


def transformers_trainer(recipe: Recipe) -> dict[str, Any]:
    """transformers' Llama under its Trainer."""
    import transformers

    steps = len(recipe.batches)
    seconds: list[float] = []

    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.began)

    class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
        def __len__(self) -> int:
            return steps * recipe.batches.shape[1]

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            row = recipe.batches.flatten(0, 1)[index]
            return {"input_ids": row[:-1], "labels": row[1:], "shift_labels": row[1:]}

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(Rows())

    settings = transformers.TrainingArguments(
        str(recipe.folder / "trainer"), max_steps=steps, per_device_train_batch_size=recipe.batches.shape[1],
        learning_rate=recipe.settings["learning_rate"], warmup_steps=recipe.settings["warmup"],
        lr_scheduler_type="constant_with_warmup", optim="adamw_torch_fused", weight_decay=WEIGHT_DECAY,
        adam_beta1=BETAS[0], adam_beta2=BETAS[1], adam_epsilon=EPS, max_grad_norm=CLIP, save_strategy="no",
        report_to=[], logging_steps=1, use_cpu=True, disable_tqdm=True, bf16=recipe.precision == "bf16",
        torch_compile=recipe.compiled, remove_unused_columns=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM.from_pretrained(recipe.folder / "weights", attn_implementation="sdpa")
    trainer = InOrder(model, settings, train_dataset=Rows(), callbacks=[Watch()])
    trainer.train()
    return {"losses": [e["loss"] for e in trainer.state.log_history if "loss" in e], "seconds": seconds}


def litgpt_step(recipe: Recipe) -> dict[str, Any]:
    """litgpt's GPT in Llama's shape, with its loss, from Llama's weights by its own conversion."""
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from litgpt.utils import chunked_cross_entropy
    from safetensors.torch import load_file

    shape = recipe.settings["shape"]
    config = Config(
        name="peer", block_size=shape["max_position_embeddings"], vocab_size=shape["vocab_size"],
        padded_vocab_size=shape["vocab_size"], n_layer=shape["num_hidden_layers"], n_head=shape["num_attention_heads"],
        n_embd=shape["hidden_size"], intermediate_size=shape["intermediate_size"], rotary_percentage=1.0,
        parallel_residual=False, bias=False, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", norm_eps=1e-5,
        rope_base=10_000,
    )  # fmt: skip
    state: dict[str, Any] = {}
    copy_weights_hf_llama(config, {}, state, load_file(recipe.folder / "weights" / "model.safetensors"))
    model = GPT(config)
    model.load_state_dict(state)
    called = torch.compile(model) if recipe.compiled else model
    # Its pretraining computes the loss of whole logits too.
    return step_by_step(recipe, model, lambda x, y: chunked_cross_entropy(called(x), y, chunk_size=0))


def nanogpt_shape(recipe: Recipe) -> dict[str, Any]:
    """GPT-2's block as small trainers write it out: LayerNorm, GELU, positions in a table, one product for q, k, v."""
    shape = recipe.settings["shape"]
    torch.manual_seed(0)
    model = _Gpt(shape["vocab_size"], shape["max_position_embeddings"], shape["hidden_size"],
                 shape["num_hidden_layers"], shape["num_attention_heads"])  # fmt: skip
    called = torch.compile(model) if recipe.compiled else model
    return step_by_step(recipe, model, lambda x, y: F.cross_entropy(called(x).flatten(0, 1), y.flatten()))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(heads.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class _Gpt(nn.Module):
    def __init__(self, vocab: int, context: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocab, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width, bias=False), nn.Linear(width, vocab, bias=False)
        for weight in (p for p in self.parameters() if p.dim() == 2):
            nn.init.normal_(weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


PEERS = {
    "transformers, bare step": transformers_step,
    "transformers, Trainer": transformers_trainer,
    "litgpt": litgpt_step,
    "nanoGPT's shape": nanogpt_shape,
}


def main(peer: str, folder: str, precision: str, mode: str, out: str) -> None:
    recipe = Recipe(Path(folder), precision, mode == "compile")
    found = PEERS[peer](recipe)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    Path(out).write_text(json.dumps({**found, "peak_mib": round(peak)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
