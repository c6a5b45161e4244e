"""A run's weights for other programs: as one safetensors file under our own names, or as a Hugging Face folder."""

from __future__ import annotations

import json
import secrets
import shutil
import sys
from pathlib import Path

from safetensors import SafetensorError, safe_open

from pipeline.checkpoint.layout import published, step_of
from pipeline.checkpoint.read import newest_checkpoint, verify
from pipeline.checkpoint.weights import write_weights
from pipeline.data.tokenize import tokenizer_json
from pipeline.data.tokenize.tokenizer import Tokenizer
from pipeline.errors import UsageError
from pipeline.files import fsync_dir, naming, staged_dir, write_bytes, write_json
from pipeline.huggingface import model_folder
from pipeline.huggingface.llama import llama_config, llama_name, llama_rows
from pipeline.run.folder import Run, step_name

FORMATS = ("hf", "safetensors")


def export_run(run: Run, form: str, step: int | None = None, output: Path | None = None) -> Path:
    """Writes the weights of a run for other programs and returns the folder or file.

    Args:
        run: The run.
        form: `hf` makes a folder that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`
            open, `safetensors` one file with our own names.
        step: Step of the checkpoint; None takes the newest that is whole.
        output: The folder or file to write; by default one in the run's `export/`.

    Raises:
        UsageError: The format is unknown, no checkpoint has this step, or `output` holds something else.
        CheckpointError: The checkpoint is damaged.
    """
    if form not in FORMATS:
        raise UsageError(f"--format {form}: allowed are {' and '.join(FORMATS)}")
    checkpoint = _checkpoint(run, step)
    path = output or run.exports / (
        f"{checkpoint.name}.safetensors" if form == "safetensors" else f"{checkpoint.name}-hf"
    )
    with naming(path, "cannot be written", "choose another place with --output"):
        if form == "safetensors":
            _write_file(path, run, checkpoint)
        else:
            _write_hugging_face(path, run, checkpoint)
    return path


def _checkpoint(run: Run, step: int | None) -> Path:
    if step is None:
        return newest_checkpoint(run.checkpoints)
    folder = run.checkpoints / step_name(step)
    if not folder.is_dir():
        there = ", ".join(str(step_of(f)) for f in reversed(published(run.checkpoints))) or "none"
        raise UsageError(f"{run.path}: has no checkpoint of step {step}; there are: {there}")
    verify(folder)
    return folder


def _metadata(checkpoint: Path) -> dict[str, str]:
    return {"format": "pt", "step": str(step_of(checkpoint))}


def _write_file(path: Path, run: Run, checkpoint: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        write_weights(temp, checkpoint, {**_metadata(checkpoint), "model": run.config().model.model_dump_json()})
        temp.replace(path)
        fsync_dir(path.parent)
    finally:
        temp.unlink(missing_ok=True)


def _write_hugging_face(folder: Path, run: Run, checkpoint: Path) -> None:
    config = run.config()
    model = config.model
    _check_replaceable(folder)
    tokenizer = Tokenizer.load(run.tokenizer_file, config.tokenizer.end_of_text, run.path)
    end = tokenizer.end_of_text_id
    with staged_dir(folder) as temp:
        write_weights(
            temp / model_folder.WEIGHTS,
            checkpoint,
            _metadata(checkpoint),
            rename=llama_name,
            reorder=lambda name, weight: llama_rows(name, weight, model.num_heads),
        )
        write_bytes(temp / model_folder.TOKENIZER, _as_trained(tokenizer, run))
        write_json(temp / model_folder.CONFIG, llama_config(model, end))
        write_json(temp / model_folder.GENERATION_CONFIG, model_folder.generation_config(config.sample, end))
        write_json(
            temp / model_folder.TOKENIZER_CONFIG,
            model_folder.tokenizer_config(tokenizer.end_of_text, model.context_length),
        )
        if folder.exists():  # an earlier export; a rename replaces only an empty folder
            shutil.rmtree(folder)


def _as_trained(tokenizer: Tokenizer, run: Run) -> bytes:
    """Returns the tokenizer.json for other programs, which encodes as training did; says so where it is changed."""
    given = json.loads(tokenizer.content)
    ours = tokenizer_json.without_added_tokens(given)
    changed = [name for name in ("post_processor", "truncation", "padding") if ours[name] != given.get(name)]
    if not changed:
        return tokenizer.content
    print(
        f"pipeline: {run.tokenizer_file}: the export leaves out its {', '.join(changed)}: training encoded every "
        "document without, and the model never saw, for one, a token at the beginning",
        file=sys.stderr,
    )
    return json.dumps(ours, ensure_ascii=False).encode()


def _check_replaceable(folder: Path) -> None:
    """Rejects a place that holds anything but an earlier export: it would be deleted."""
    if not folder.exists():
        return
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    if names and (names != model_folder.FILES or not _is_ours(folder / model_folder.WEIGHTS)):
        strange = sorted(names - model_folder.FILES)[:3]
        others = f" ({', '.join(strange)})" if strange else ""
        raise UsageError(
            f"{folder}: exists and is not a model exported by this program, or holds other files{others} too; "
            "choose another place with --output"
        )


def _is_ours(weights: Path) -> bool:
    """Whether the file names the step it was exported from, which other programs' files do not."""
    try:
        with safe_open(weights, framework="pt") as file:
            return "step" in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False
