"""Our settings translated into a DeepSpeed config."""

from __future__ import annotations

from typing import Any

import torch

from pipeline.config.sections import Config
from pipeline.model.layers import TransformerBlock
from pipeline.run.world import World
from pipeline.train.engine.build import working_dtype


def deepspeed_config(config: Config, world: World) -> dict[str, Any]:
    """Returns the DeepSpeed config; the user's `deepspeed` section is merged in, and our own settings win."""
    train = config.train
    own: dict[str, Any] = {
        "train_batch_size": train.batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.batch_size // (train.micro_batch_size * world.size),
        "gradient_clipping": 0.0,  # its default is 1.0; we clip ourselves
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": _zero_settings(config),
    }
    if working_dtype(train) == torch.bfloat16:
        # The overflow check would make the host wait; we check loss and norm ourselves.
        own["bf16"] = {"enabled": True, "check_grad_overflow": False}
        if train.zero_stage > 1:
            own["data_types"] = {"grad_accum_dtype": "fp32"}
    # Its throughput timer would make the host wait for the device twice per micro-batch.
    quiet = {"steps_per_print": 1 << 62, "timers": {"throughput": {"enabled": False}}}
    merged = {**quiet, **config.deepspeed, **own}
    merged["zero_optimization"] = {**config.deepspeed.get("zero_optimization", {}), **own["zero_optimization"]}
    return merged


def _zero_settings(config: Config) -> dict[str, Any]:
    settings: dict[str, Any] = {"stage": config.train.zero_stage}
    if config.train.overlap_comm is not None:
        settings["overlap_comm"] = config.train.overlap_comm
    if config.train.zero_stage == 3:
        # A block's weights are gathered by one message, once even if its activations are recomputed, and no hook inside
        # it breaks a compiled graph.
        settings["leaf_module"] = {"classes": [f"{TransformerBlock.__module__}.{TransformerBlock.__qualname__}"]}
    if config.train.zero_stage in (1, 2) and not config.train.offload_optimizer:
        # We know the norm already, and DeepSpeed would make the host wait for its own.
        settings["compute_grad_norm"] = False
    if config.train.offload_optimizer:
        settings["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return settings
