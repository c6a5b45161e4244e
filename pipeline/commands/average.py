"""`pipeline average`: a run folder that holds one checkpoint, the average of several of a run's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from pipeline.checkpoint.average import WEIGHTINGS, shares, write_average
from pipeline.checkpoint.layout import Manifest, published, step_of
from pipeline.checkpoint.read import verify
from pipeline.errors import UsageError
from pipeline.files import naming, read_bounded, sha256_bytes, staged_dir, write_bytes
from pipeline.run.folder import Run, step_name
from pipeline.run.provenance import collect_provenance
from pipeline.run.records import Origin, lineage

# What follows from the weights and the data alone; the rest is of training, which an average cannot resume.
_KEPT = ("config", "tokenizer", "dataset", "initialization", "tokens_seen")


def average_run(run: Run, steps: Sequence[int] | int, weighting: str, output: Path) -> list[int]:
    """Writes the average of checkpoints as a run folder, and returns their steps, the oldest first.

    `evaluate`, `sample`, `export` and `init` take the folder like any other run's; it has no moments to resume with.

    Args:
        run: The run.
        steps: The steps of the checkpoints, or how many of the newest.
        weighting: How much each of them counts: `uniform` or `1-sqrt`.
        output: The folder to write, which must not exist.

    Raises:
        UsageError: A checkpoint is not there, `output` exists, or the weighting is unknown.
        CheckpointError: A checkpoint is damaged.
    """
    if weighting not in WEIGHTINGS:
        raise UsageError(f"--weights {weighting}: allowed are {' and '.join(WEIGHTINGS)}")
    if output.exists() or output.is_symlink():
        raise UsageError(f"--output {output}: exists already; choose another folder")
    checkpoints = _chosen(run, steps)
    manifests = [verify(checkpoint) for checkpoint in checkpoints]
    found = [manifest.step for manifest in manifests]
    origin = _origin(run, checkpoints, weighting)
    state: dict[str, Any] = {key: manifests[-1].state[key] for key in _KEPT if key in manifests[-1].state}
    with naming(output, "cannot be written", "choose another folder with --output"), staged_dir(output) as folder:
        made = Run(folder)
        checkpoint = made.checkpoints / step_name(found[-1])
        checkpoint.mkdir(parents=True)
        write_average(checkpoint, checkpoints, weighting, {**state, "init": origin})
        write_bytes(made.config_file, run.config_text().encode())
        write_bytes(made.tokenizer_file, read_bounded(run.tokenizer_file, run.path))
        made.add_provenance({**collect_provenance(), "init": origin})
    return found


def _chosen(run: Run, steps: Sequence[int] | int) -> list[Path]:
    there = list(reversed(published(run.checkpoints)))
    if isinstance(steps, int):
        if len(there) < steps:
            raise UsageError(f"--last {steps}: {run.checkpoints} holds {len(there)} checkpoints")
        return there[-steps:]
    missing = [step for step in steps if run.checkpoints / step_name(step) not in there]
    if missing:
        known = ", ".join(str(step_of(path)) for path in there) or "none"
        raise UsageError(f"--steps: {run.path} has no checkpoint of step {missing[0]}; there are: {known}")
    return [run.checkpoints / step_name(step) for step in sorted(set(steps))]


def _origin(run: Run, checkpoints: Sequence[Path], weighting: str) -> Origin:
    digests = [Manifest.load_named(checkpoint)[1] for checkpoint in checkpoints]
    found = {
        "from": str(run.path.resolve()),
        "digest": sha256_bytes(" ".join(digests).encode()),
        "step": step_of(checkpoints[-1]),
        "what": f"{weighting} average of {len(checkpoints)} checkpoints up to that",
        "checkpoints": [
            {"step": step_of(checkpoint), "digest": digest, "share": share}
            for checkpoint, digest, share in zip(checkpoints, digests, shares(len(checkpoints), weighting), strict=True)
        ],
    }
    return cast(Origin, {**found, "ancestors": lineage(run.origin())})
