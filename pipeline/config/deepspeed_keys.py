"""DeepSpeed settings that the section `deepspeed` must not hold, and what decides each of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.config.section_base import wrong_value
from pipeline.errors import Problem

# A second value under `deepspeed` would contradict what the project decides itself.
_DECIDED_BY = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.batch_size and train.micro_batch_size",
    "gradient_clipping": "optimizer.gradient_clip_val",
    "optimizer": "the section `optimizer`",
    "scheduler": "the section `optimizer`",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "data_types": "train.precision",
    "compile": "train.compile",
    "activation_checkpointing": "train.activation_checkpointing",
    "zero_allow_untested_optimizer": "the project: it has its own optimiser",
    "zero_force_ds_cpu_optimizer": "the project: it has its own optimiser",
    "zero_optimization.stage": "train.zero_stage",
    "zero_optimization.offload_optimizer": "train.offload_optimizer",
    "zero_optimization.offload_param": "the project: weights stay on the device",
    "zero_optimization.overlap_comm": "train.overlap_comm",
    "zero_optimization.cpu_offload": "train.offload_optimizer",
    "zero_optimization.compute_grad_norm": "the project: it clips gradients itself",
    "communication_data_type": "the project: gradients are averaged in float32",
    "sparse_gradients": "the project: gradients are dense",
    "compression_training": "the project: it has its own model",
    "progressive_layer_drop": "the project: it has its own model",
    "curriculum_learning": "the project: it draws the batches itself",
    "data_efficiency": "the project: it draws the batches itself",
    "elasticity": "the project: a run resumes at any world size",
    "zero_optimization.mics_shard_size": "the project: a run resumes at any world size",
    "zero_optimization.zero_quantized_weights": "the project: nothing is rounded in transit",
    "zero_optimization.zero_quantized_nontrainable_weights": "the project: nothing is rounded in transit",
    "zero_optimization.zero_quantized_gradients": "the project: nothing is rounded in transit",
}


def forbidden_keys(given: Mapping[str, Any]) -> Iterator[Problem]:
    """Yields one problem per DeepSpeed setting that the project decides; paths are relative to `deepspeed`."""
    zero = given.get("zero_optimization", {})
    if not isinstance(zero, dict):
        yield wrong_value("zero_optimization", zero, "a mapping")
        zero = {}
    values = {**given, **{f"zero_optimization.{key}": value for key, value in zero.items()}}
    for key, owner in _DECIDED_BY.items():
        if key in values:
            yield wrong_value(key, values[key], f"nothing; it is decided by {owner}")
