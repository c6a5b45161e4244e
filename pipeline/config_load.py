"""YAML + dotted overrides -> a validated `Config`, or every problem at once."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.config import Config
from pipeline.errors import ConfigError, Problem, UsageError


class _Loader(yaml.SafeLoader):
    """The safe loader, with YAML 1.2 floats (`1e-3` is a number) and without duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


# PyYAML follows YAML 1.1, where 1e-3 is a string: a learning rate would fail for want of a dot.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


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
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: the config file cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: the config file is not UTF-8 text ({error.reason} at byte {error.start})") from error
    return parse_config(text, overrides, source=str(path), world_size=world_size)


def parse_config(text: str, overrides: Sequence[str] = (), source: str = "config", world_size: int = 1) -> Config:
    """Like `load_config`, from the text of the file; `source` names it in messages."""
    tree = _parse_yaml(text, source)
    problems = [p for p in (_apply_override(tree, o) for o in overrides) if p is not None]
    config, field_problems = _validate(tree)
    problems += field_problems
    if config is not None:
        problems += cross_checks(config, world_size, flawed=frozenset(p.path for p in problems))
    if problems:
        raise ConfigError(source, problems)
    assert config is not None
    return config


def dump_config(config: Config) -> str:
    """The resolved config as YAML that `parse_config` reads back to an equal tree."""
    return yaml.safe_dump(json.loads(config.model_dump_json()), sort_keys=False, allow_unicode=True)


def json_schema() -> dict[str, Any]:
    """The JSON schema by which editors complete and check the YAML."""
    schema = Config.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


# ---- parsing ---------------------------------------------------------------------------------


def _parse_yaml(text: str, source: str) -> dict[str, Any]:
    try:
        tree = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(source, [Problem("", f"bad YAML, {where}{error.problem}")]) from error
    except yaml.YAMLError as error:
        raise ConfigError(source, [Problem("", f"bad YAML: {error}")]) from error
    if tree is None:
        raise ConfigError(source, [Problem("", "the file is empty; start from a copy of configs/demo.yaml")])
    if not isinstance(tree, dict):
        raise ConfigError(source, [Problem("", f"holds a {type(tree).__name__}, allowed: sections of `key: value`")])
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> Problem | None:
    dotted, equals, value = override.partition("=")
    keys = dotted.split(".")
    if not equals or not all(keys):
        return Problem(override, "is not an override, allowed: dotted.key=value, `train.max_iters=100` say")
    node: Any = tree
    for depth, key in enumerate(keys[:-1]):
        node = _child(node, key)
        if not isinstance(node, (dict, list)):
            return Problem(dotted, f"{'.'.join(keys[: depth + 1])} is not a section that can be overridden")
    try:
        parsed = yaml.load(value, Loader=_Loader)
    except yaml.YAMLError:
        return Problem(dotted, f"the value {value!r} is not valid YAML")
    if isinstance(node, list):
        if not keys[-1].isdigit() or int(keys[-1]) >= len(node):
            return Problem(dotted, f"has {len(node)} entries, allowed: an index from 0 to {len(node) - 1}")
        node[int(keys[-1])] = parsed
    else:
        node[keys[-1]] = parsed
    return None


def _child(node: Any, key: str) -> Any:
    if isinstance(node, list):
        return node[int(key)] if key.isdigit() and int(key) < len(node) else None
    if node.get(key) is None:
        node[key] = {}
    return node[key]


# ---- validation ------------------------------------------------------------------------------


def _validate(tree: dict[str, Any]) -> tuple[Config | None, list[Problem]]:
    """The config and what is wrong with single fields.

    A config is returned too where the flawed fields can be stood in for, so that cross-field problems
    of the other fields are not hidden behind a typing mistake.
    """
    try:
        return _strict(tree), []
    except ValidationError as error:
        errors = error.errors()
    problems = [_problem(tree, e) for e in errors]
    for e in sorted(errors, key=lambda e: len(e["loc"]), reverse=True):
        _replace_by_placeholder(tree, e["loc"])
    try:
        return _strict(tree), problems
    except ValidationError:
        return None, problems


def _strict(tree: dict[str, Any]) -> Config:
    # Strict JSON mode: "3", 3.0 and true are no integers, while lists still become tuples.
    return Config.model_validate_json(json.dumps(tree, default=str), strict=True)


def _replace_by_placeholder(tree: Any, loc: tuple[int | str, ...]) -> None:
    """Takes a flawed value out; a required one is replaced, so that the rest can still be checked."""
    for key in loc[:-1]:
        try:
            tree = tree[key]
        except (KeyError, IndexError, TypeError):
            return
    if not isinstance(tree, dict):
        return
    tree.pop(loc[-1], None)
    section, field = (str(loc[-2]) if len(loc) > 1 else ""), str(loc[-1])
    info = _model_of(section).model_fields.get(field)
    if info is not None and info.is_required():
        tree[field] = "placeholder" if info.annotation is str else 1


def _model_of(section: str) -> type[BaseModel]:
    annotation = Config.model_fields[section].annotation if section in Config.model_fields else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else Config


def _problem(tree: dict[str, Any], error: Any) -> Problem:
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return Problem(path, _unknown_key_message(path))
    if error["type"] == "missing":
        return Problem(path, "is missing and has no default")
    allowed = re.sub(r"^(Input|Value|String|Tuple|Dictionary) should (be |have )?", "", error["msg"])
    return Problem(path, f"given {_shown(error['input'])}, allowed: {allowed}")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _unknown_key_message(path: str) -> str:
    section, _, key = path.rpartition(".")
    plain_section = re.sub(r"\.\d+(?=\.|$)", "", section)
    known = list(known_paths())
    siblings = [p for p in known if p.rpartition(".")[0] == plain_section]
    for candidates in (siblings, known):
        leaves = {p.rpartition(".")[2]: p for p in reversed(candidates)}
        near = difflib.get_close_matches(key, leaves, n=1, cutoff=0.6)
        if near:
            found_section, _, leaf = leaves[near[0]].rpartition(".")
            where = f"in the section `{found_section}`" if found_section else "at the top level"
            return f"unknown key; did you mean `{leaf}` {where}?"
    names = ", ".join(p.rpartition(".")[2] for p in siblings)
    return f"unknown key; allowed here: {names}"


def known_paths(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Dotted paths of every section and field, without list indices."""
    for name, info in model.model_fields.items():
        yield prefix + name
        for part in (info.annotation, *get_args(info.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from known_paths(part, f"{prefix}{name}.")


# ---- checks across fields --------------------------------------------------------------------


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
}


def _deepspeed_problems(config: Config) -> list[Problem]:
    given = dict(config.deepspeed)
    zero = given.get("zero_optimization", {})
    if not isinstance(zero, dict):
        return [Problem("deepspeed.zero_optimization", f"given {_shown(zero)}, allowed: a mapping")]
    given |= {f"zero_optimization.{key}": value for key, value in zero.items()}
    return [
        Problem(f"deepspeed.{key}", f"given {_shown(given[key])}, allowed: nothing; it is decided by {owner}")
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
