"""What `pipeline check` says about the data: is it there, how often is each source read, what does validation cost?"""

from __future__ import annotations

import shutil
from pathlib import Path

from pipeline.check.result import Check
from pipeline.config.sections import Config
from pipeline.data.layout import MANIFEST
from pipeline.data.manifest import DatasetManifest, check_sizes
from pipeline.data.order.run_order import refuse_unfit_validation, run_order, source_tokens
from pipeline.data.read.sources import find_files
from pipeline.errors import PipelineError
from pipeline.files import nearest_existing
from pipeline.text_format import megabytes, short

# The value of repeated text decays with a half-life of about so many epochs (Muennighoff et al. 2023, section 6).
_MOST_EPOCHS = 16
# Of a step's time; forward and backward are three.
_FORWARD = 1 / 3


def check_data(config: Config) -> list[Check]:
    """Looks at the dataset, or at the sources it will be made from, and at how it will be read."""
    data = check_dataset(config)
    if data.status != "ok" or _is_to_be_prepared(config):
        return [data]
    manifest = DatasetManifest.load(Path(config.data.path))
    return [data, _epochs(config, manifest), _validation(config, manifest)]


def check_dataset(config: Config) -> Check:
    """Looks at the dataset, or at the sources it will be made from."""
    folder = Path(config.data.path)
    if _is_to_be_prepared(config):
        return _sources(config, folder)
    try:
        manifest = DatasetManifest.load(folder)
        tokens_in = manifest.tokens_in(folder, config.data.token_folder)
        check_sizes(folder, manifest.shards, manifest.numpy_dtype, tokens_in=tokens_in)
    except PipelineError as error:
        return Check("data", "failed", str(error), f"`pipeline verify {folder}` names every damaged file")
    found = f"{manifest.splits['train'].tokens:,} training tokens, sizes agree with the manifest"
    return Check("data", "ok", found)


def _is_to_be_prepared(config: Config) -> bool:
    return not (Path(config.data.path) / MANIFEST).exists() and config.data.token_folder is None


def _sources(config: Config, folder: Path) -> Check:
    try:
        files = [file for source in config.data.sources for file in find_files(source)]
    except PipelineError as error:
        return Check("data", "failed", str(error), "correct data.sources")
    size = sum(Path(file.path).stat().st_size for file in files)
    found = f"to be prepared from {len(files):,} files, {megabytes(size)}"
    place = nearest_existing(folder)
    free = shutil.disk_usage(place).free
    if free < size:  # tokens usually take half of plain text, and more than compressed text
        return Check("data", "warning", f"{found}; {megabytes(free)} are free at {place}", "make room for the tokens")
    return Check("data", "ok", found)


def _epochs(config: Config, manifest: DatasetManifest) -> Check:
    """Says how often the run reads each source."""
    train, context = config.train, config.model.context_length
    try:
        order, streams, _ = run_order(
            Path(config.data.path),
            manifest,
            config.data,
            seed=train.seed,
            context_length=context,
            batch_size=train.batch_size,
        )
    except PipelineError as error:
        return Check("epochs", "failed", str(error), "correct the section `data`")
    drawn = order.counts(train.max_iters * train.batch_size).tolist()
    of_stream = {
        name: count / windows if count else 0.0
        for name, count, windows in zip(streams, drawn, order.windows, strict=True)
    }
    tokens = source_tokens(manifest.splits["train"].shards)
    # Without weights the sources are one stream, and all are read equally often.
    epochs = of_stream if order.weights else dict.fromkeys(tokens, *of_stream.values())
    parts = [
        f"{name} {short(number * tokens[name])} tokens, {number:.3g} epochs" if number else f"{name} not at all"
        for name, number in epochs.items()
    ]
    found = f"in {train.max_iters:,} steps: {'; '.join(parts)}"
    weighted = [source.name for source in config.data.sources if source.weight != 1 and source.split != "validation"]
    if weighted and not order.weights:
        cure = f"nothing reads the weight of {', '.join(weighted)}: set data.mixing=weighted, or leave it out"
        return Check("epochs", "warning", found, cure)
    often = [name for name, number in epochs.items() if number > _MOST_EPOCHS]
    if not often:
        return Check("epochs", "ok", found)
    cure = f"text that is read more than {_MOST_EPOCHS} times teaches little: lower the weight of {', '.join(often)}"
    return Check("epochs", "warning", found, cure if order.weights else "lower train.max_iters, or add text")


def _validation(config: Config, manifest: DatasetManifest) -> Check:
    """Says what validation costs."""
    train, context, shards = config.train, config.model.context_length, manifest.splits["validation"].shards
    try:
        refuse_unfit_validation(Path(config.data.path), shards, context)
    except PipelineError as error:
        return Check("validation", "failed", str(error), "training would refuse it for the same reason")
    tokens = source_tokens(shards)
    most = train.num_val_batches * train.batch_size
    windows = sum(min(most, max(1, (count - 1) // context)) for count in tokens.values())
    steps = _FORWARD * windows / train.batch_size
    found = (
        f"{windows:,} windows of {', '.join(tokens)} every {train.val_interval:,} steps take about as long as "
        f"{steps:.3g} steps, {steps / (train.val_interval + steps):.1%} of the run"
    )
    return Check("validation", "ok", found)
