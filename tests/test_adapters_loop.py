"""A complete training loop written with nothing but the functions of tests/adapters.py learns a small text."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch

from tests import adapters

TEXT = b"the cat sat on the mat. the dog sat on the log. the cat saw the dog. " * 40
VOCAB, CONTEXT, D_MODEL, LAYERS, HEADS, D_FF = 128, 32, 64, 2, 4, 128


def new_weights() -> dict[str, torch.Tensor]:
    """Random weights under the state-dict names of the design."""
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int, std: float | None = None) -> torch.Tensor:
        std = std or math.sqrt(2 / (rows + columns))
        return torch.randn(rows, columns, generator=generator).mul(std).requires_grad_()

    weights = {"token_embeddings.weight": matrix(VOCAB, D_MODEL, 1.0), "lm_head.weight": matrix(VOCAB, D_MODEL)}
    weights["ln_final.weight"] = torch.ones(D_MODEL, requires_grad=True)
    for i in range(LAYERS):
        for name in ("q_proj", "k_proj", "v_proj", "output_proj"):
            weights[f"layers.{i}.attn.{name}.weight"] = matrix(D_MODEL, D_MODEL)
        for name in ("ln1", "ln2"):
            weights[f"layers.{i}.{name}.weight"] = torch.ones(D_MODEL, requires_grad=True)
        weights[f"layers.{i}.ffn.w1.weight"] = matrix(D_FF, D_MODEL)
        weights[f"layers.{i}.ffn.w2.weight"] = matrix(D_MODEL, D_FF)
        weights[f"layers.{i}.ffn.w3.weight"] = matrix(D_FF, D_MODEL)
    return weights


class ByAdapters(torch.nn.Module):
    """A language model whose forward is written with the adapters of its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.names = list(new_weights())
        self.values = torch.nn.ParameterList(torch.nn.Parameter(w.detach()) for w in new_weights().values())

    def weights(self) -> dict[str, torch.Tensor]:
        return dict(zip(self.names, self.values, strict=True))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        w = self.weights()
        x = torch.nn.functional.embedding(ids, w["token_embeddings.weight"])
        for i in range(LAYERS):
            p = f"layers.{i}."
            x = x + self.attention(self.norm(x, w[p + "ln1.weight"]), w, p + "attn.")
            h = self.norm(x, w[p + "ln2.weight"])
            gate = adapters.run_silu(h @ w[p + "ffn.w1.weight"].T)
            x = x + (gate * (h @ w[p + "ffn.w3.weight"].T)) @ w[p + "ffn.w2.weight"].T
        return self.norm(x, w["ln_final.weight"]) @ w["lm_head.weight"].T

    def attention(self, x: torch.Tensor, w: dict[str, torch.Tensor], p: str) -> torch.Tensor:
        positions = torch.arange(x.shape[-2])
        q, k, v = (
            (x @ w[f"{p}{n}.weight"].T).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for n in ("q_proj", "k_proj", "v_proj")
        )
        q, k = (adapters.run_rope(D_MODEL // HEADS, 10000.0, CONTEXT, t, positions) for t in (q, k))
        mask = torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool).tril()
        heads = adapters.run_scaled_dot_product_attention(q, k, v, mask)
        return heads.transpose(1, 2).flatten(-2) @ w[p + "output_proj.weight"].T

    @staticmethod
    def norm(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * gain


def train(model: ByAdapters, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    data = np.frombuffer(TEXT, dtype=np.uint8).astype(np.uint16)
    losses = []
    for step in steps:
        torch.manual_seed(step)
        for group in optimizer.param_groups:
            group["lr"] = adapters.run_get_lr_cosine_schedule(step, 3e-3, 3e-4, 10, 120)
        optimizer.zero_grad()
        x, y = adapters.run_get_batch(data, 16, CONTEXT, "cpu")
        logits = model(x)
        loss = adapters.run_cross_entropy(logits.flatten(0, 1), y.flatten())
        loss.backward()
        adapters.run_gradient_clipping(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def new_optimizer(model: ByAdapters) -> torch.optim.Optimizer:
    return adapters.get_adamw_cls()(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01)


def test_a_loop_of_adapters_learns_and_resumes_to_the_bit(tmp_path):
    model = ByAdapters()
    optimizer = new_optimizer(model)
    losses = train(model, optimizer, range(60))
    adapters.run_save_checkpoint(model, optimizer, 60, tmp_path / "checkpoint")
    losses += train(model, optimizer, range(60, 120))
    assert losses[0] > 4
    assert losses[-1] < 0.3, "the text repeats; a model that learns knows it by now"

    resumed = ByAdapters()
    resumed_optimizer = new_optimizer(resumed)
    assert adapters.run_load_checkpoint(tmp_path / "checkpoint", resumed, resumed_optimizer) == 60
    assert train(resumed, resumed_optimizer, range(60, 120)) == losses[60:]

    by_parts, whole = model(torch.arange(20)[None]), lm_logits(model.weights(), torch.arange(20)[None])
    torch.testing.assert_close(by_parts, whole, rtol=1e-4, atol=1e-4)


def lm_logits(weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    detached = {name: w.detach() for name, w in weights.items()}
    return adapters.run_transformer_lm(VOCAB, CONTEXT, D_MODEL, LAYERS, HEADS, D_FF, 10000.0, detached, ids)


def test_the_parts_agree_with_the_block_and_with_each_other():
    weights = {n.removeprefix("layers.0."): w.detach() for n, w in new_weights().items() if n.startswith("layers.0.")}
    x = torch.randn(2, 9, D_MODEL, generator=torch.Generator().manual_seed(1))
    projections = [weights[f"attn.{n}.weight"] for n in ("q_proj", "k_proj", "v_proj", "output_proj")]

    def norm(name: str, h: torch.Tensor) -> torch.Tensor:
        return adapters.run_rmsnorm(D_MODEL, 1e-5, weights[name], h)

    attended = adapters.run_multihead_self_attention_with_rope(
        D_MODEL, HEADS, CONTEXT, 10000.0, *projections, norm("ln1.weight", x), torch.arange(9)[None]
    )
    h = x + attended
    feed_forward = adapters.run_swiglu(
        D_MODEL, D_FF, *(weights[f"ffn.w{i}.weight"] for i in (1, 2, 3)), norm("ln2.weight", h)
    )
    block = adapters.run_transformer_block(D_MODEL, HEADS, D_FF, CONTEXT, 10000.0, weights, x)
    torch.testing.assert_close(block, h + feed_forward)


def test_attention_without_rope_is_attention_at_position_zero():
    projections = [torch.randn(16, 16, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    x = torch.randn(3, 7, 16)
    plain = adapters.run_multihead_self_attention(16, 4, *projections, x)
    at_zero = adapters.run_multihead_self_attention_with_rope(
        16, 4, 7, 10000.0, *projections, x, torch.zeros(3, 7, dtype=torch.int64)
    )
    torch.testing.assert_close(plain, at_zero)


def test_linear_embedding_softmax_as_matrix_algebra():
    weights, x = torch.randn(5, 3), torch.randn(2, 4, 3)
    torch.testing.assert_close(adapters.run_linear(3, 5, weights, x), x @ weights.T)
    ids = torch.tensor([[4, 0], [1, 1]])
    torch.testing.assert_close(adapters.run_embedding(5, 3, weights, ids), weights[ids], rtol=0, atol=0)
    torch.testing.assert_close(adapters.run_softmax(x, dim=-2), torch.softmax(x, dim=-2))


@pytest.mark.parametrize("to_memory", [False, True])
def test_checkpoints_restore_any_model_and_optimizer_state_exactly(tmp_path, to_memory):
    def build(seed: int):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        return model, adapters.get_adamw_cls()(model.parameters(), lr=0.1, betas=(0.8, 0.9), eps=1e-7, weight_decay=0.3)

    model, optimizer = build(0)
    for _ in range(3):
        model(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()
    target = io.BytesIO() if to_memory else tmp_path / "file"
    adapters.run_save_checkpoint(model, optimizer, 41, target)
    if to_memory:
        target.seek(0)
    other, other_optimizer = build(1)
    assert adapters.run_load_checkpoint(target, other, other_optimizer) == 41
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    ours, theirs = optimizer.state_dict(), other_optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    for index, state in ours["state"].items():
        for key, value in state.items():
            restored = theirs["state"][index][key]
            assert torch.equal(value, restored) if isinstance(value, torch.Tensor) else value == restored


def test_batches_are_shifted_by_one_and_their_starts_uniform():
    data = np.arange(100, dtype=np.uint16)
    torch.manual_seed(0)
    starts = torch.zeros(100)
    for _ in range(200):
        x, y = adapters.run_get_batch(data, 32, 7, "cpu")
        assert x.shape == y.shape == (32, 7) and x.dtype == y.dtype == torch.int64
        assert torch.equal(x + 1, y)
        assert torch.equal(x, x[:, :1] + torch.arange(7))
        starts += torch.bincount(x[:, 0], minlength=100)
    assert starts[93:].sum() == 0 and (starts[:93] > 0).all()
    expected = 32 * 200 / 93
    assert (starts[:93] - expected).abs().max() < 5 * math.sqrt(expected)


def test_a_bad_device_raises_the_error_of_torch():
    with pytest.raises((RuntimeError, AssertionError), match="CUDA"):
        adapters.run_get_batch(np.arange(100), 4, 8, "cuda:99")
