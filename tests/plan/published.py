"""Models and clusters whose memory and speed others have published."""

from __future__ import annotations

from pipeline.config.load import load_config
from pipeline.config.sections import Config
from pipeline.plan.devices import device_named
from pipeline.plan.plan import Cluster

# Touvron et al. 2023 (LLaMA), table 2: parameters, d_model, heads, layers; d_ff from the released configs. This
# project's model has the same parts: SwiGLU, RMSNorm, RoPE, no biases, untied head, 32,000 tokens. Table 15: GPU-hours
# on A100-80GB for 1.0 and 1.4 trillion tokens.
LLAMA = {
    "7B": (6.7e9, 4096, 32, 32, 11008, 82_432, 1.0e12),
    "13B": (13.0e9, 5120, 40, 40, 13824, 135_168, 1.0e12),
    "33B": (32.5e9, 6656, 52, 60, 17920, 530_432, 1.4e12),
    "65B": (65.2e9, 8192, 64, 80, 22016, 1_022_362, 1.4e12),
}


def llama(name: str, **train: object) -> Config:
    _, d_model, heads, layers, d_ff, _, _ = LLAMA[name]
    overrides = {
        "model.vocab_size": 32000, "model.context_length": 2048, "model.d_model": d_model, "model.num_heads": heads,
        "model.num_layers": layers, "model.d_ff": d_ff, "train.batch_size": 2048, "train.micro_batch_size": 1,
        "model.qk_norm": "false", "train.precision": "bf16",
        **{f"train.{key}": value for key, value in train.items()},
    }  # fmt: skip
    return load_config("configs/demo.yaml", [f"{key}={value}" for key, value in overrides.items()])


def cluster_of(device: str, **changes: float) -> Cluster:
    """Nodes as usual for this device."""
    found = device_named(device)
    return Cluster(found, found.per_node, found.intra_gb_per_s, found.inter_gb_per_s, **changes)
