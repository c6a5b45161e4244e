"""The DeepSpeed settings that a config may hold, and why others may not.

Allowed is what leaves the promises of a run alone; docs/training.md says what each key does to them. Everything else is
refused, also what a later DeepSpeed invents.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config.section_base import wrong_value
from pipeline.errors import Problem

_ZERO = "zero_optimization"


@dataclass(frozen=True)
class Setting:
    """What a setting may be."""

    values: str
    """In words."""
    accepts: Callable[[Any], bool]
    """Whether it may be this value."""


def _whole(least: int) -> Setting:
    # True would pass for 1.
    return Setting(f"a whole number of at least {least}", lambda value: type(value) is int and value >= least)


ALLOWED: dict[str, Setting] = {
    "communication_data_type": Setting('"fp32"', lambda value: value == "fp32"),
    f"{_ZERO}.reduce_bucket_size": _whole(1),
    f"{_ZERO}.allgather_bucket_size": _whole(1),
    f"{_ZERO}.parameter_alignment": Setting("true or false", lambda value: isinstance(value, bool)),
    f"{_ZERO}.sub_group_size": _whole(1),
    f"{_ZERO}.stage3_prefetch_bucket_size": _whole(0),
    f"{_ZERO}.stage3_param_persistence_threshold": _whole(0),
    f"{_ZERO}.stage3_model_persistence_threshold": _whole(0),
    f"{_ZERO}.stage3_max_live_parameters": _whole(0),
    f"{_ZERO}.stage3_max_reuse_distance": _whole(0),
    f"{_ZERO}.zero_hpz_partition_size": _whole(1),
}
"""By dotted path below `deepspeed`."""

_OWN_MODEL = "the project has its own model"
_OWN_OPTIMIZER = "the project has its own optimiser"
_OWN_DATA = "the project draws the batches itself"
_OWN_CHECKPOINTS = "the project writes and reads its own checkpoints"
_OWN_REDUCTION = "gradients are averaged over all ranks and clipped once per step"
_DATA_PARALLEL = "the project is data-parallel: its batches and checkpoints know no other dimension"
_SILENT = "DeepSpeed's reports are switched off, and its timers make the host wait for the device; see metrics.jsonl"
_RECORDED = "a run is recorded by the section `tracking`, and nothing else writes files or sends data"
_UNROUNDED = "nothing is rounded in transit beyond train.precision"
_ON_DEVICE = "weights stay on the device"
_AS_DEFAULT = "only DeepSpeed's default is tested with the project's checkpoints"


def _decided_by(owner: str) -> str:
    return f"it is decided by {owner}"


# Why, for what a user is likely to bring along from a config of DeepSpeed or of another program.
_REFUSED: dict[str, str] = {
    "train_batch_size": _decided_by("train.batch_size"),
    "train_micro_batch_size_per_gpu": _decided_by("train.micro_batch_size"),
    "gradient_accumulation_steps": _decided_by("train.batch_size and train.micro_batch_size"),
    "gradient_clipping": _decided_by("optimizer.gradient_clip_val"),
    "optimizer": _decided_by("the section `optimizer`"),
    "scheduler": _decided_by("the section `optimizer`"),
    **dict.fromkeys(
        ("fp16", "bf16", "bfloat16", "amp", "torch_autocast", "data_types"), _decided_by("train.precision")
    ),
    "compile": _decided_by("train.compile"),
    "activation_checkpointing": _decided_by("train.activation_checkpointing"),
    **dict.fromkeys(("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"), _OWN_OPTIMIZER),
    **dict.fromkeys(
        ("managed_gradient_accumulation", "gradient_allreduce_op", "prescale_gradients", "gradient_predivide_factor",
         "disable_allgather", "sparse_gradients"),
        _OWN_REDUCTION,
    ),
    **dict.fromkeys(
        ("compression_training", "progressive_layer_drop", "weight_quantization", "hybrid_engine", "sparse_attention"),
        _OWN_MODEL,
    ),
    **dict.fromkeys(("curriculum_learning", "data_efficiency", "dataloader_drop_last"), _OWN_DATA),
    **dict.fromkeys(("checkpoint", "datastates_ckpt", "nebula", "aio"), _OWN_CHECKPOINTS),
    **dict.fromkeys(
        ("tensor_parallel", "expert_parallel", "pipeline", "sequence_parallel_size",
         "use_data_before_expert_parallelism", "seq_parallel_communication_data_type"),
        _DATA_PARALLEL,
    ),
    "elasticity": "a run resumes at any number of processes",
    "autotuning": "it starts runs of its own; `pipeline plan` and `submit --sweep` compare settings",
    **dict.fromkeys(
        ("steps_per_print", "timers", "wall_clock_breakdown", "memory_breakdown", "comms_logger", "flops_profiler",
         "dump_state", "log_level"),
        _SILENT,
    ),
    **dict.fromkeys(("tensorboard", "wandb", "csv_monitor", "comet"), _RECORDED),
    f"{_ZERO}.stage": _decided_by("train.zero_stage"),
    f"{_ZERO}.overlap_comm": _decided_by("train.overlap_comm"),
    **dict.fromkeys((f"{_ZERO}.offload_optimizer", f"{_ZERO}.cpu_offload"), _decided_by("train.offload_optimizer")),
    **dict.fromkeys(
        (f"{_ZERO}.offload_param", f"{_ZERO}.cpu_offload_param", f"{_ZERO}.cpu_offload_use_pin_memory"), _ON_DEVICE
    ),
    f"{_ZERO}.compute_grad_norm": _OWN_REDUCTION,
    f"{_ZERO}.zenflow": "it updates some weights later than others, so that a checkpoint would hold no single step",
    f"{_ZERO}.leaf_module": "the project names the modules that ZeRO-3 gathers whole: its blocks",
    f"{_ZERO}.mics_shard_size": "a run resumes at any number of processes; zero_hpz_partition_size does the like",
    **dict.fromkeys(
        (f"{_ZERO}.zero_quantized_weights", f"{_ZERO}.zero_quantized_nontrainable_weights",
         f"{_ZERO}.zero_quantized_gradients"),
        _UNROUNDED,
    ),
    **dict.fromkeys(
        (f"{_ZERO}.elastic_checkpoint", f"{_ZERO}.load_from_fp32_weights", f"{_ZERO}.pipeline_loading_checkpoint",
         f"{_ZERO}.gather_16bit_weights_on_model_save", f"{_ZERO}.stage3_gather_16bit_weights_on_model_save",
         f"{_ZERO}.stage3_gather_fp16_weights_on_model_save"),
        _OWN_CHECKPOINTS,
    ),
    **dict.fromkeys(
        (f"{_ZERO}.contiguous_gradients", f"{_ZERO}.reduce_scatter", f"{_ZERO}.use_multi_rank_bucket_allreduce",
         f"{_ZERO}.allgather_partitions", f"{_ZERO}.round_robin_gradients", f"{_ZERO}.legacy_stage1",
         f"{_ZERO}.memory_efficient_linear", f"{_ZERO}.override_module_apply"),
        _AS_DEFAULT,
    ),
}  # fmt: skip


def refused_settings(given: Mapping[str, Any]) -> Iterator[Problem]:
    """Yields one problem per setting that is not allowed or has a wrong value; paths are relative to `deepspeed`."""
    for key, value in given.items():
        if key != _ZERO:
            yield from _problems(str(key), value)
        elif not isinstance(value, dict):
            yield wrong_value(_ZERO, value, "a mapping")
        else:
            for inner, setting in value.items():
                yield from _problems(f"{_ZERO}.{inner}", setting)


def _problems(path: str, value: Any) -> Iterator[Problem]:
    allowed = ALLOWED.get(path)
    if allowed is None:
        yield wrong_value(path, value, f"nothing; {_REFUSED.get(path) or _unknown(path)}")
    elif not allowed.accepts(value):
        yield wrong_value(path, value, allowed.values)


def _unknown(path: str) -> str:
    section, _, key = path.rpartition(".")
    siblings = [p.rpartition(".")[2] for p in ALLOWED if p.rpartition(".")[0] == section]
    near = [f"stage3_{key}"] if f"stage3_{key}" in siblings else difflib.get_close_matches(key, siblings, n=1)
    if near:
        return f"did you mean `{near[0]}`?"
    return f"it is not known to keep the promises of a run; the section may hold {', '.join(siblings)}"
