"""The settings that decide the content of a dataset, and how the settings of two datasets differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.config.data_sections import SourceConfig
from pipeline.config.sections import Config
from pipeline.config.where import parse_where
from pipeline.errors import DataError, listing

# These decide how tokens are stored and divided into files, not which tokens there are.
_STORAGE_SETTINGS = ("dtype", "slice_size_mb")


def settings_of(config: Config) -> dict[str, Any]:
    """Returns the settings that decide the bytes of a config's dataset; `weight` and `order` only concern training."""
    data, tokenizer = config.data, config.tokenizer
    return {
        "sources": [_source_settings(source) for source in data.sources],
        "validation_fraction": data.validation_fraction,
        "dtype": data.dtype,
        "slice_size_mb": data.slice_size_mb,
        "max_document_mb": data.max_document_mb,
        "tokenizer": {
            "kind": tokenizer.kind,
            "end_of_text": tokenizer.end_of_text,
            **({"special_tokens": list(tokenizer.special_tokens)} if tokenizer.kind == "bytes" else {}),
            **(
                {
                    "special_tokens": list(tokenizer.special_tokens),
                    "split_pattern": tokenizer.split_pattern,
                    "train_sample_mb": tokenizer.train_sample_mb,
                    "vocab_size": config.model.vocab_size,
                }
                if tokenizer.kind == "bpe"
                else {}
            ),
        },
    }


def _source_settings(source: SourceConfig) -> dict[str, Any]:
    settings = {name: getattr(source, name) for name in ("name", "separator", "field", "split")}
    # Only where there is one, and without the spaces of the user: datasets of older versions have no such key.
    return settings if source.where is None else {**settings, "where": str(parse_where(source.where))}


def refuse_other_settings(path: str | Path, settings: dict[str, Any], config: Config) -> None:
    """Refuses a finished dataset whose documents or tokens differ from those that the config describes.

    Compares settings only: the text may be moved or removed once the dataset is finished.

    Raises:
        DataError: Names every setting that differs.
    """
    if "adopted" in settings:
        return  # others made the tokens: the config describes no text
    problems = changed_settings(_content_settings(settings), _content_settings(settings_of(config)))
    if problems:
        title = f"{path}: was prepared with settings that differ from the config's:"
        raise DataError(listing(title, problems, "Restore these settings, or prepare the data at another data.path."))


def changed_settings(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Returns the differences between two results of `settings_of`, one line per setting."""
    before, after = ({s["name"]: s for s in settings["sources"]} for settings in (old, new))
    problems = [f"sources.{name}: was there before, is missing now" for name in before if name not in after]
    problems += [f"sources.{name}: is new" for name in after if name not in before]
    for name in before:
        problems += _changed(before[name], after.get(name, before[name]), f"sources.{name}.")
    if not problems and list(before) != list(after):
        problems.append(f"sources: in the order {', '.join(before)} before, {', '.join(after)} now")
    return problems + _changed(_without(old, "sources"), _without(new, "sources"))


def _changed(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    problems = []
    for key in {**old, **new}:
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            problems += _changed(before, after, f"{prefix}{key}.")
        elif before != after:
            problems.append(f"{prefix}{key}: {before!r} before, {after!r} now")
    return problems


def _content_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings that decide the documents and their tokens, with the sources sorted by name."""
    sources = sorted(settings["sources"], key=lambda source: str(source["name"]))
    return {**_without(settings, *_STORAGE_SETTINGS), "sources": sources}


def _without(settings: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in names}
