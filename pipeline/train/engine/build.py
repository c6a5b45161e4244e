"""The model that DeepSpeed gets: its weights in their working dtype, partitioned from the start at ZeRO stage 3.

All weights are zero here. Fresh ones and those of a checkpoint come in the same way later: each rank fills the float32
weights that it holds, and the working weights are made from them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pipeline.config.sections import Config
from pipeline.config.train_sections import TrainConfig
from pipeline.model.transformer import TransformerLM


def working_dtype(train: TrainConfig) -> torch.dtype:
    """Returns the dtype of the weights that forward and backward use.

    At stage 0 DeepSpeed keeps no float32 masters beside them, so they are float32 and autocast makes bf16 copies.
    """
    return torch.bfloat16 if train.precision == "bf16" and train.zero_stage > 0 else torch.float32


def build(config: Config, device: torch.device, settings: dict[str, Any]) -> TransformerLM:
    """Returns the model with zeros for weights; at stage 3 no rank holds more than one parameter whole at a time.

    Args:
        config: The experiment.
        device: Where the weights go.
        settings: The DeepSpeed config.
    """
    model = TransformerLM(**config.model.model_dump(), device=torch.device("meta"))
    partition = _partitioner(settings, working_dtype(config.train)) if config.train.zero_stage == 3 else None
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            zeros = torch.zeros(parameter.shape, dtype=working_dtype(config.train), device=device)
            setattr(module, name, nn.Parameter(zeros))
            if partition is not None:
                partition(getattr(module, name))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    if partition is not None and config.model.tie_embeddings:
        _gather_for_head(model)
    return model


def _gather_for_head(model: TransformerLM) -> None:
    """Makes ZeRO-3 gather the embedding's weight for the calls of the head that has none of its own."""
    import deepspeed

    deepspeed.zero.register_external_parameter(model.lm_head, model.token_embeddings.weight)


def _partitioner(settings: dict[str, Any], dtype: torch.dtype) -> Any:
    """Returns a function that cuts a parameter into the ranks' partitions in place.

    Not `with deepspeed.zero.Init()`, which would patch PyTorch's constructors and cast what RoPE computes in float64;
    and without the broadcast that its own functions begin with, for there is nothing to tell the ranks yet.
    """
    import deepspeed

    init = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=settings, dtype=dtype)

    def partition(parameter: Any) -> None:
        init._convert_to_deepspeed_param(parameter)
        parameter.partition()

    return partition
