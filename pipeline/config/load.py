"""YAML + dotted overrides -> a validated `Config`, or every problem at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.sections import Config
from pipeline.config.yaml_tree import Vocabulary, dump, shown
from pipeline.errors import Problem
from pipeline.text_format import byte_characters

CONFIG = Vocabulary(Config, "config", "configs/demo.yaml")


def load_config(path: str | Path, overrides: Sequence[str] = (), world_size: int = 1) -> Config:
    """Reads a config file and applies overrides.

    Args:
        path: The YAML file.
        overrides: `dotted.key=value` strings; values are parsed as YAML.
        world_size: Processes that will train, for the check of the global batch.

    Raises:
        UsageError: The file cannot be read.
        ConfigError: Everything that is wrong with it.
    """
    return parse_config(CONFIG.read(path), overrides, source=str(path), world_size=world_size)


def parse_config(text: str, overrides: Sequence[str] = (), source: str = "config", world_size: int = 1) -> Config:
    """Like `load_config`, from the text of the file; `source` names it in messages."""
    config, problems = CONFIG.parse(text, overrides, source)
    if config is not None:
        problems += cross_checks(config, world_size, flawed=frozenset(p.path for p in problems))
    if problems:
        raise CONFIG.refusal(source, problems)
    assert config is not None
    return config


def dump_config(config: Config) -> str:
    """The resolved config as YAML that `parse_config` reads back to an equal tree."""
    return dump(config)


# ---- checks across fields --------------------------------------------------------------------


def _ordinary_characters(config: Config) -> list[str]:
    """The special tokens that are entries of every vocabulary that is made here."""
    wanted = (config.tokenizer.end_of_text, *config.tokenizer.special_tokens)
    return [token for token in wanted if token in byte_characters()]


@dataclass(frozen=True)
class _Check:
    """A rule between the fields `uses`; the first is the one that is reported."""

    uses: tuple[str, ...]
    broken: Callable[[Config], bool]
    message: Callable[[Config], str]


_CHECKS = (
    _Check(
        ("model.d_model", "model.num_heads"),
        lambda c: c.model.d_model % c.model.num_heads != 0,
        lambda c: f"given {c.model.d_model}, allowed: a multiple of num_heads = {c.model.num_heads}",
    ),
    _Check(
        ("model.num_heads", "model.d_model"),
        lambda c: c.model.d_model % c.model.num_heads == 0 and (c.model.d_model // c.model.num_heads) % 2 != 0,
        lambda c: (
            f"given {c.model.num_heads}, which makes heads of {c.model.d_model // c.model.num_heads}; "
            "allowed: an even head size (d_model / num_heads), because RoPE rotates pairs"
        ),
    ),
    _Check(
        ("optimizer.warmup_iters", "optimizer.cosine_cycle_iters"),
        lambda c: c.optimizer.warmup_iters > c.optimizer.cosine_cycle_iters,
        lambda c: (
            f"given {c.optimizer.warmup_iters}, allowed: at most cosine_cycle_iters = {c.optimizer.cosine_cycle_iters}"
        ),
    ),
    _Check(
        ("optimizer.min_learning_rate", "optimizer.learning_rate"),
        lambda c: c.optimizer.min_learning_rate > c.optimizer.learning_rate,
        lambda c: (
            f"given {c.optimizer.min_learning_rate}, allowed: at most learning_rate = {c.optimizer.learning_rate}"
        ),
    ),
    _Check(
        ("data.dtype", "model.vocab_size"),
        lambda c: c.data.dtype == "uint16" and c.model.vocab_size > 1 << 16,
        lambda c: (
            f"given uint16, which holds 65536 token ids; vocab_size = {c.model.vocab_size} needs uint32 (or auto)"
        ),
    ),
    _Check(
        ("model.vocab_size", "tokenizer.kind", "tokenizer.special_tokens"),
        lambda c: c.tokenizer.kind != "file" and c.model.vocab_size < 257 + len(c.tokenizer.special_tokens),
        lambda c: (
            f"given {c.model.vocab_size}, allowed: at least {257 + len(c.tokenizer.special_tokens)} "
            "(256 bytes and the special tokens)"
        ),
    ),
    _Check(
        ("tokenizer.path", "tokenizer.kind"),
        lambda c: (c.tokenizer.kind == "file") != (c.tokenizer.path is not None),
        lambda c: (
            "is missing; kind: file needs the tokenizer.json to take"
            if c.tokenizer.kind == "file"
            else f"given {c.tokenizer.path!r}, allowed: only with kind: file"
        ),
    ),
    _Check(
        ("tokenizer.special_tokens", "tokenizer.end_of_text"),
        lambda c: len({*c.tokenizer.special_tokens, c.tokenizer.end_of_text}) <= len(c.tokenizer.special_tokens),
        lambda c: "names a token twice (end_of_text is one already)",
    ),
    _Check(
        ("tokenizer.special_tokens", "tokenizer.kind"),
        lambda c: c.tokenizer.kind == "file" and bool(c.tokenizer.special_tokens),
        lambda c: "given with kind: file, allowed: none; the tokenizer.json has its own",
    ),
    _Check(
        ("tokenizer.end_of_text", "tokenizer.special_tokens", "tokenizer.kind"),
        lambda c: c.tokenizer.kind != "file" and bool(_ordinary_characters(c)),
        lambda c: (
            f"{', '.join(map(repr, _ordinary_characters(c)))}: given a character that the vocabulary has as "
            "ordinary text, allowed for end_of_text and special_tokens: a word, <|endoftext|> say"
        ),
    ),
    _Check(
        ("data.sources",),
        lambda c: len({s.name for s in c.data.sources}) < len(c.data.sources),
        lambda c: "two sources have the same name",
    ),
    _Check(
        ("data.sources",),
        lambda c: all(s.split == "validation" for s in c.data.sources),
        lambda c: "every source has split: validation, so that nothing is left to train on",
    ),
    _Check(
        ("tracking.uri",),
        lambda c: c.tracking.uri_problem() is not None,
        lambda c: c.tracking.uri_problem() or "",
    ),
    _Check(
        ("train.offload_optimizer", "train.zero_stage"),
        lambda c: c.train.offload_optimizer and c.train.zero_stage == 0,
        lambda c: "given true, allowed: only with zero_stage 1, 2 or 3",
    ),
    _Check(
        ("train.overlap_comm", "train.zero_stage"),
        lambda c: c.train.overlap_comm and c.train.zero_stage == 0,
        lambda c: "given true, allowed: only with zero_stage 1, 2 or 3",
    ),
)

# What the project decides itself: a second value under `deepspeed` would contradict it.
_OWN_DEEPSPEED_KEYS = {
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
    "zero_allow_untested_optimizer": "the project: the optimiser is its own",
    "zero_force_ds_cpu_optimizer": "the project: the optimiser is its own",
    "zero_optimization.stage": "train.zero_stage",
    "zero_optimization.offload_optimizer": "train.offload_optimizer",
    "zero_optimization.offload_param": "the project: weights stay on the device",
    "zero_optimization.overlap_comm": "train.overlap_comm",
    "zero_optimization.cpu_offload": "train.offload_optimizer",
    "zero_optimization.compute_grad_norm": "the project: it clips itself",
    "communication_data_type": "the project: gradients are averaged in float32",
    "sparse_gradients": "the project: gradients are dense",
    "compression_training": "the project: the model is its own",
    "progressive_layer_drop": "the project: the model is its own",
    "curriculum_learning": "the project: it draws the batches itself",
    "data_efficiency": "the project: it draws the batches itself",
    "elasticity": "the project: a run goes on at any world size",
    "zero_optimization.mics_shard_size": "the project: a run goes on at any world size",
    "zero_optimization.zero_quantized_weights": "the project: nothing is rounded on its way",
    "zero_optimization.zero_quantized_nontrainable_weights": "the project: nothing is rounded on its way",
    "zero_optimization.zero_quantized_gradients": "the project: nothing is rounded on its way",
}


def _deepspeed_problems(config: Config) -> list[Problem]:
    given = dict(config.deepspeed)
    zero = given.get("zero_optimization", {})
    if not isinstance(zero, dict):
        return [Problem("deepspeed.zero_optimization", f"given {shown(zero)}, allowed: a mapping")]
    given |= {f"zero_optimization.{key}": value for key, value in zero.items()}
    return [
        Problem(f"deepspeed.{key}", f"given {shown(given[key])}, allowed: nothing; it is decided by {owner}")
        for key, owner in _OWN_DEEPSPEED_KEYS.items()
        if key in given
    ]


def cross_checks(config: Config, world_size: int = 1, flawed: frozenset[str] = frozenset()) -> list[Problem]:
    """What is wrong between fields that are each valid by themselves.

    Args:
        config: The tree.
        world_size: Processes that will train.
        flawed: Paths known to be wrong already; rules that use them are left out.
    """
    problems = [
        Problem(check.uses[0], check.message(config))
        for check in _CHECKS
        if flawed.isdisjoint(check.uses) and check.broken(config)
    ]
    if flawed.isdisjoint(("train.batch_size", "train.micro_batch_size")):
        problems += [Problem("train.batch_size", m) for m in config.data_parallel_problems(world_size)]
    if "deepspeed" not in flawed:
        problems += _deepspeed_problems(config)
    return problems
