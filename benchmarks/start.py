"""Measures the memory and time that a start at ZeRO-3 costs each rank: the engine and its fresh weights.

Private memory (RssAnon), sampled every millisecond. A rank that trains also allocates the slab of its saves, 12 bytes
per parameter that it owns, which is not counted here.

python -m benchmarks.start
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import refuse_arguments, save
from tests import experiment, processes
from tests.train.loading import MB, fresh_start

SHAPE = {
    "model.vocab_size": 32000, "model.d_model": 1280, "model.num_heads": 20, "model.d_ff": 3456,
    "train.zero_stage": 3, "train.micro_batch_size": 1,
}  # fmt: skip
CASES = {"500M parameters, 4 ranks": (21, 4), "260M parameters, 8 ranks": (9, 8)}  # layers, ranks
BEFORE = {
    "commit": "179787a",
    "what": "every rank built the whole float32 model and DeepSpeed cut it; bf16 held the same",
    "peak": {"500M parameters, 4 ranks": 2699, "260M parameters, 8 ranks": 1791},
}
"""The same measurement of the last engine that built the whole model on every rank, in MiB."""


def measure(folder: Path, layers: int, ranks: int, precision: str) -> dict[str, Any]:
    settings = {**SHAPE, "model.num_layers": layers, "train.precision": precision}
    config = experiment.write_experiment(folder, folder / "runs", "start", **settings)
    began = time.monotonic()
    found = processes.on_ranks(fresh_start, ranks, folder / "log", str(config), timeout_s=900)
    limit = max(rank["share"] + rank["parameter"] for rank in found) + 600 * MB
    return {
        **{key: round(max(rank[key] for rank in found) / MB) for key in found[0]},
        "share + one parameter + 600": round(limit / MB),
        "seconds": round(time.monotonic() - began),
    }


def main() -> None:
    refuse_arguments(__doc__)
    figures: dict[str, Any] = {"before": BEFORE}
    with tempfile.TemporaryDirectory() as folder:
        for case, (layers, ranks) in CASES.items():
            figures[case] = {p: measure(Path(folder), layers, ranks, p) for p in ("fp32", "bf16")}
            print(case, figures[case], flush=True)
    save("start", figures, "MiB of the rank with most; share: weights, gradients, masters and both moments")


if __name__ == "__main__":
    main()
