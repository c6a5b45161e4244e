"""Mutations of everything that others can give: each ends in success or in one message, in bounded time and memory.

python -m tests.mutations KIND SEED COUNT      one process, with a limit on its memory; prints a line per failure
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from pipeline.errors import PipelineError
from tests.mutating import ODD, garble, mutate, mutated_json, put, sealed

ROOT = Path(__file__).parent.parent
SECONDS = 10  # of CPU time
WALL_SECONDS = 60  # beyond which it waits for something that never comes
BYTES = 1 << 30


# ---- the kinds: each yields functions of a random generator ------------------------------------------


def config(rng: random.Random, folder: Path) -> None:
    """A config and overrides."""
    from pipeline.config.load import dump_config, load_config

    file = folder / "config.yaml"
    original = rng.choice(sorted((ROOT / "configs").glob("*.yaml"))).read_bytes()
    mutated = rng.randrange(2) == 0
    content = yaml.safe_dump(mutate(yaml.safe_load(original), rng)).encode() if mutated else garble(original, rng)
    put(file, content, rng)
    keys = ["train.seed", "name", "data.sources.0.paths", "data.sources.²", "x", "data.sources.0.weight", "", "a.b.c"]
    overrides = [f"{rng.choice(keys)}={_shown(rng)}" for _ in range(rng.randrange(3))]
    dump_config(load_config(file, overrides))


def _shown(rng: random.Random) -> str:
    value = rng.choice(ODD)
    return value if isinstance(value, str) else json.dumps(value)


def site(rng: random.Random, folder: Path) -> None:
    """A site, down to the batch scripts that it makes."""
    from pipeline.launch.submit.chain import plan_chain
    from pipeline.launch.submit.summary import dry_run

    original = rng.choice(sorted((ROOT / "slurm" / "sites").glob("*.yaml"))).read_bytes()
    mutated = rng.randrange(2) == 0
    content = yaml.safe_dump(mutate(yaml.safe_load(original), rng)).encode() if mutated else garble(original, rng)
    put(folder / "site.yaml", content, rng)
    text = (ROOT / "configs" / "demo.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("batch_size: 64", "batch_size: 64"))
    script = dry_run(plan_chain(str(folder / "config.yaml"), str(folder / "site.yaml"), [], []))
    assert "\x1b" not in script


def dataset(rng: random.Random, folder: Path) -> None:
    """The manifest, the records and the files of a dataset."""
    from pipeline.cli.data import inspect, verify
    from pipeline.data.dataset import open_splits

    copy = _copy(folder, "dataset")
    manifest = copy / "manifest.json"
    if rng.randrange(3):
        put(manifest, mutated_json(manifest, rng, sealed((",", ":"))), rng)
    else:
        file = rng.choice(sorted(path for path in copy.rglob("*") if path.is_file()))
        put(file, garble(file.read_bytes(), rng), rng)
    first = [
        lambda: open_splits(copy, vocab_size=300),
        lambda: verify(str(copy)),
        lambda: rng.randrange(4) or inspect(str(copy), count=2, split="train", seed=0, html=str(folder / "page.html")),
    ]
    _each(first)


def checkpoint(rng: random.Random, folder: Path) -> None:
    """The manifest and the files of a checkpoint."""
    from pipeline.checkpoint.read import newest_checkpoint
    from pipeline.checkpoint.weights import load_weights

    copy = _copy(folder, "run") / "checkpoints"
    inside = next(path for path in sorted(copy.glob("step_*")))
    manifest = inside / "manifest.json"
    if rng.randrange(4):
        put(manifest, mutated_json(manifest, rng, sealed(None)), rng)
    else:
        file = inside / "rank_00000.safetensors"
        put(file, garble(file.read_bytes(), rng), rng)
    _each([lambda: newest_checkpoint(copy), lambda: load_weights(inside)])


def run(rng: random.Random, folder: Path) -> None:
    """The files of a run folder, as status, report, logs and the feed of MLflow read them."""
    from pipeline.cli.cluster import logs, status
    from pipeline.run.folder import open_run
    from pipeline.tracking.report.report import write_report
    from pipeline.tracking.upload import describe

    copy = _copy(folder, "run")
    names = ["config.yaml", "events.jsonl", "metrics.jsonl", "provenance.json", "mlflow.json", "evaluation.json",
             "launch/jobs.json", "launch/attempts.jsonl", "samples/step_00000002.txt"]  # fmt: skip
    for name in rng.sample(names, rng.randint(1, 2)):
        file = copy / name
        if file.suffix == ".json":
            put(file, mutated_json(file, rng), rng)
        elif file.suffix == ".jsonl" and rng.randrange(4):
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            put(file, "".join(json.dumps(one) + "\n" for one in mutate(lines, rng)).encode(), rng)
        else:
            put(file, garble(file.read_bytes(), rng), rng)
    _each(
        [
            lambda: status([str(copy)]),
            lambda: status([str(copy)], as_json=True),
            lambda: logs(str(copy), rank=0),
            lambda: rng.randrange(4) or write_report([open_run(copy)], folder / "report.html"),
            lambda: describe.tags(open_run(copy)),
            lambda: describe.evaluation(open_run(copy)),
            lambda: list(describe.files(open_run(copy))),
        ]
    )


def tokenizer(rng: random.Random, folder: Path) -> None:
    """A tokenizer.json."""
    from pipeline.data.tokenize.tokenizer import Tokenizer

    file = folder / "tokenizer.json"
    shutil.copyfile(_made() / rng.choice(["bpe.json", "words.json"]), file)
    put(file, mutated_json(file, rng), rng)
    loaded = Tokenizer.load(file)
    loaded.decode(loaded.encode("war and peace in Zürich, 1790"))


def token_files(rng: random.Random, folder: Path) -> None:
    """Token files of others, as they are adopted, and the dataset that comes of it."""
    from pipeline.data.adopt.adopt import adopt
    from pipeline.data.adopt.find import find_sources
    from pipeline.data.dataset import open_splits
    from pipeline.data.tokenize.tokenizer import Tokenizer
    from tests.mutated import TOKEN_FILES

    copy = _copy(folder, "token_files")
    format_name, name, dtype = rng.choice(TOKEN_FILES)
    file = rng.choice(sorted((copy / format_name).iterdir()))
    content = file.read_bytes()
    if file.suffix == ".gz" and rng.randrange(2):
        content = gzip.compress(garble(gzip.decompress(content), rng))
    else:
        content = garble(content, rng)
    put(file, content, rng)
    if rng.randrange(8) == 0:
        dtype = rng.choice(["uint8", "uint16", "uint32", "int64", None])
    sources = find_sources(format_name, [str(copy / format_name / name)], (), dtype)
    tokenizer = Tokenizer.load(copy / "tokenizer.json")
    adopt(sources, format_name, tokenizer, folder / "out", rng.choice([0.0, 0.2]), lambda done, total: None)
    open_splits(folder / "out", ("train",), verify=True, token_folder=str(copy / format_name))


KINDS: dict[str, Callable[[random.Random, Path], None]] = {
    "config": config, "site": site, "dataset": dataset, "checkpoint": checkpoint, "run": run, "tokenizer": tokenizer,
    "token_files": token_files,
}  # fmt: skip


def _each(actions: list[Callable[[], Any]]) -> None:
    """Does all, whether or not those before were refused."""
    for action in actions:
        with contextlib.suppress(PipelineError):
            action()


def _copy(folder: Path, what: str) -> Path:
    return Path(shutil.copytree(_made() / what, folder / what))


def _made() -> Path:
    return Path(os.environ["MUTATED"])


# ---- running them ----------------------------------------------------------------------------------


class _TooLongError(BaseException):
    pass


def _too_long(number: int, frame: FrameType | None) -> None:
    raise _TooLongError


def failures(kind: str, seed: int, count: int) -> list[str]:
    """Runs mutations of one kind in this process; returns one text per mutation that did not end as it should."""
    signal.signal(signal.SIGALRM, _too_long)
    with (
        contextlib.suppress(PipelineError),
        contextlib.redirect_stdout(io.StringIO()),
        tempfile.TemporaryDirectory() as temp,
    ):
        KINDS[kind](random.Random(0), Path(temp))  # imports, which no mutation is to pay for
    found = []
    for number in range(count):
        rng = random.Random(f"{kind} {seed} {number}")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with tempfile.TemporaryDirectory() as temp:
            folder = Path(os.path.realpath(temp))
            os.chdir(folder)
            signal.alarm(WALL_SECONDS)
            began = time.process_time()
            try:
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    KINDS[kind](rng, folder)
            except PipelineError as error:
                if len(str(error)) > 100_000:
                    found.append(f"{kind} {seed} {number}: a message of {len(str(error))} characters")
            except BaseException as error:
                found.append(f"{kind} {seed} {number}: {type(error).__name__}\n{traceback.format_exc()}")
            finally:
                signal.alarm(0)
                os.chdir("/")
        if time.process_time() - began > SECONDS:
            found.append(f"{kind} {seed} {number}: took {time.process_time() - began:.0f} s")
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        if grown > BYTES:
            found.append(f"{kind} {seed} {number}: took {grown >> 20} MiB")
    return found


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    seen = failures(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    print("\n".join(seen))
    print(f"{len(seen)} failures, {time.process_time():.1f} s of CPU time")
    sys.exit(1 if seen else 0)
