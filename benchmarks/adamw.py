"""Measures one AdamW step: ours in cache-sized chunks, ours on whole tensors, torch's loop, foreach and fused.

python -m benchmarks.adamw
"""

from __future__ import annotations

import torch

import pipeline.optim.adamw as own
from benchmarks.harness import interleaved, save
from pipeline.model.transformer import TransformerLM

ROUNDS = 15


def one_flat_tensor(parameters: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.cat([p.detach().view(-1) for p in parameters]))]


def measure(layout: str) -> dict[str, float]:
    torch.manual_seed(0)
    model = TransformerLM(8192, 256, 320, 4, 5, 853, 10000.0)
    flat = layout == "one flat tensor"

    def parameters() -> list[torch.nn.Parameter]:
        copies = [torch.nn.Parameter(p.detach().clone()) for p in model.parameters()]
        copies = one_flat_tensor(copies) if flat else copies
        for p in copies:
            p.grad = torch.randn_like(p)
        return copies

    chunked, whole = own.AdamW(parameters()), own.AdamW(parameters())
    peers = {
        "torch for-loop": torch.optim.AdamW(parameters(), foreach=False),
        "torch foreach": torch.optim.AdamW(parameters(), foreach=True),
        "torch fused": torch.optim.AdamW(parameters(), fused=True),
    }

    def step_on_whole_tensors() -> None:
        chunk, own.CPU_CHUNK = own.CPU_CHUNK, 1 << 62
        try:
            whole.step()
        finally:
            own.CPU_CHUNK = chunk

    calls = {"own, chunks": chunked.step, "own, whole tensors": step_on_whole_tensors}
    seconds = interleaved(calls | {name: peer.step for name, peer in peers.items()}, ROUNDS)
    count = sum(p.numel() for p in model.parameters())
    print(f"{layout}: {count / 1e6:.1f}M parameters, {torch.get_num_threads()} threads")
    return {name: round(value * 1e3, 2) for name, value in seconds.items()}


if __name__ == "__main__":
    figures = {layout: measure(layout) for layout in ("one tensor per parameter", "one flat tensor")}
    save("adamw", {"milliseconds_per_step": figures, "threads": torch.get_num_threads()})
