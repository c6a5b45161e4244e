"""Writing a new config or site file: an example of the project under another name, adapted to open weights if asked."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import pipeline
from pipeline.config.load import parse_config
from pipeline.errors import UsageError
from pipeline.files import read_json, write_text
from pipeline.huggingface.config_json import model_section
from pipeline.huggingface.model_folder import CONFIG, TOKENIZER
from pipeline.launch.site import parse_site
from pipeline.model.flops import num_parameters

EXAMPLES = Path(pipeline.__file__).parent / "examples"
"""The folders `configs` and `sites`: links to those of the checkout, or copies in an installed package."""

_SITE = "gpu"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
# Text that YAML needs no quotes for.
_PLAIN = re.compile(r"(?!(?i:true|false|yes|no|on|off|null|y|n)$)[A-Za-z_][A-Za-z0-9._/-]*")
_COMMENT_COLUMN = 30
# What was learned last is lost first.
_GENTLER = 5.0
_RATES = ("learning_rate", "min_learning_rate")


def recipes() -> list[str]:
    """Returns the names of the example configs."""
    return sorted(file.stem for file in (EXAMPLES / "configs").glob("*.yaml"))


def refuse_existing(files: Sequence[Path]) -> None:
    """Checks the names of the files to write, before any of them is written.

    Raises:
        UsageError: A file exists, or its name is no name of a run or site.
    """
    for file in files:
        if file.exists() or file.is_symlink():
            raise UsageError(f"{file}: exists already and is not overwritten; choose another name, or remove it")
        if file.suffix not in (".yaml", ".yml") or not _NAME.fullmatch(file.stem):
            raise UsageError(f"{file}: is no NAME.yaml with a NAME of letters, digits, `.`, `_` and `-`")


def new_config(file: Path, recipe: str) -> None:
    """Writes a config from an example.

    Args:
        file: The file to write.
        recipe: The name of the example.

    Raises:
        UsageError: There is no such example.
    """
    if recipe not in recipes():
        near = get_close_matches(recipe, recipes(), 1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"--like {recipe}: there is no such example, only {', '.join(recipes())}{meant}")
    _publish_config(file, _example("configs", recipe).replace(f"configs/{recipe}.yaml", str(file)))


def new_config_from(file: Path, folder: Path) -> str:
    """Writes a config that continues from open weights, and returns the example that the rest is taken from.

    Args:
        file: The file to write.
        folder: A model folder in Hugging Face's format.

    Raises:
        UsageError: The folder is not one of a model that can be read.
    """
    described = read_json(folder / CONFIG, folder, UsageError)
    model = model_section(described, str(folder / CONFIG))
    size = num_parameters(model)
    examples = {name: parse_config(_example("configs", name)) for name in recipes()}
    recipe = min(examples, key=lambda name: abs(math.log(num_parameters(examples[name].model) / size)))
    example, text = examples[recipe], _example("configs", recipe)
    context = min(model.context_length, example.model.context_length)

    tokenizer = {"kind": "file", "path": str(folder / TOKENIZER), "end_of_text": _end_of_text(folder, described)}
    text = _with_section(text, "tokenizer", tokenizer, {"kind": "data prepared with another tokenizer is refused"})
    settings = model.model_copy(update={"context_length": context}).model_dump(mode="json", exclude_defaults=True)
    longest = f"up to {model.context_length}, which the weights were trained with"
    text = _with_section(text, "model", settings, {"context_length": longest})
    init = {"from": f"hf:{folder}", "what": "weights"}
    text = _with_section(text, "init", init, {"what": "moments and step begin at zero"}, before="optimizer")
    lower = {key: float(f"{getattr(example.optimizer, key) / _GENTLER:.2g}") for key in _RATES}
    text = _with_value(text, "  learning_rate", lower["learning_rate"], "a fifth of the example's, which is for noise")
    text = _with_value(text, "  min_learning_rate", lower["min_learning_rate"])
    head = [
        f"# Continues from {folder.name}: {size:,} parameters. Everything but tokenizer, model, init and the",
        f"# learning rates is from the example {recipe}: data, batch and number of steps are yours to choose.",
    ]
    schema, rest = text.split("\n", 1)
    _publish_config(file, "\n".join([schema, *head, rest[rest.index("\n\n") + 1 :]]))
    return recipe


def new_site(file: Path) -> None:
    """Writes a site file from the example of a GPU cluster."""
    text = _example("sites", _SITE).replace("Copy this file and adapt it;", "Adapt what differs on yours;")
    text = _with_value(text, "name", file.stem)
    parse_site(text, str(file))
    write_text(file, text)


def _example(folder: str, name: str) -> str:
    """Returns an example, whose first line names the schema for an editor that opens it in any folder."""
    text = (EXAMPLES / folder / f"{name}.yaml").read_text(encoding="utf-8")
    return text.replace("$schema=schema.json", f"$schema={(EXAMPLES / folder / 'schema.json').resolve()}", 1)


def _publish_config(file: Path, text: str) -> None:
    name = file.stem
    for key, value in (("name", name), ("  path", f"data/{name}"), ("  experiment", name)):
        text = _with_value(text, key, value)
    parse_config(text, source=str(file))
    write_text(file, text)


def _with_section(
    text: str, name: str, values: dict[str, Any], comments: dict[str, str], before: str | None = None
) -> str:
    """Returns the text with a section of these values in place of its own, or before another one."""
    lines = [f"{name}:", *(_line(f"  {key}", value, comments.get(key, "")) for key, value in values.items()), ""]
    found = re.search(rf"(?m)^{before or name}:\n(?:[ #].*\n)+", text)
    if found is None:
        raise ValueError(f"the example has no section {before or name}")
    new = "\n".join(lines) if before is None else "\n".join([*lines, found[0]])
    return text[: found.start()] + new + text[found.end() :]


def _with_value(text: str, key: str, value: Any, comment: str = "") -> str:
    """Returns the text with another value, and another comment, of a key that it has."""
    return re.sub(
        rf"(?m)^{key}: \S+(?: +# (.*))?$",
        lambda found: _line(key, value, comment or found[1] or ""),
        text,
        count=1,
    )


def _line(key: str, value: Any, comment: str = "") -> str:
    line = f"{key}: {_as_yaml(value)}"
    return f"{line:<{_COMMENT_COLUMN - 1}} # {comment}" if comment else line


def _as_yaml(value: Any) -> str:
    if isinstance(value, str) and _PLAIN.fullmatch(value):
        return value
    return json.dumps(value, ensure_ascii=False)


def _end_of_text(folder: Path, described: dict[str, Any]) -> str:
    """Returns the token that ends a document: the first end-of-sequence token of config.json.

    Raises:
        UsageError: It is not there, or tokenizer.json has no such token.
    """
    ids = described.get("eos_token_id")
    first = ids[0] if isinstance(ids, list) and ids else ids
    tree = read_json(folder / TOKENIZER, folder, UsageError)
    added = tree.get("added_tokens") if isinstance(tree, dict) else None
    for token in added if isinstance(added, list) else []:
        if isinstance(token, dict) and token.get("id") == first and isinstance(token.get("content"), str):
            return str(token["content"])
    raise UsageError(
        f"{folder / TOKENIZER}: among its added tokens is none with the id {first!r}, the eos_token_id of {CONFIG}; "
        "write the config with --like, and choose tokenizer.end_of_text yourself"
    )
