"""Mutations of everything that others can give: each ends in success or in one message, in bounded time and memory.

python -m tests.mutations KIND SEED COUNT      one process, with a limit on its memory; prints a line per failure
"""

from __future__ import annotations

import contextlib
import hashlib
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

ROOT = Path(__file__).parent.parent
SECONDS = 10  # of CPU time
WALL_SECONDS = 60  # beyond which it waits for something that never comes
BYTES = 1 << 30

# Values that one reader or another takes for what they are not.
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**30, -(10**30), 0.5, -0.5, 1e308, float("nan"), float("inf"),
    "", "x", "\x00", "a\nb", "\x1b[31m", "\ud800", "../..", "/etc/passwd", "/dev/zero", "--me", "[red]", "[/red]", "²",
    "010", "1:30", "x" * 5000, [], [[]], [None], ["x"], {}, {"": None}, {"x": {"y": []}}, [1, 2, 3], {"type": "x"},
]  # fmt: skip


def mutate(tree: Any, rng: random.Random) -> Any:
    """Returns a tree of plain values with one to three of its values changed, removed, moved or repeated."""
    tree = json.loads(json.dumps(tree))
    for _ in range(rng.randint(1, 3)):
        places = list(_places(tree))
        if not places:
            return tree
        node, key = rng.choice(places)
        match rng.randrange(6):
            case 0 | 1 | 2:
                node[key] = rng.choice(ODD)
            case 3:
                del node[key]
            case 4:
                other, place = rng.choice(places)
                if _has(other, place):
                    node[key] = json.loads(json.dumps(other[place]))
            case 5 if isinstance(node, dict):
                node[rng.choice(["x", "\x1b", "", "--me", "name", "²"])] = node.pop(key)
            case _:
                if isinstance(node, list):
                    node.append(node[key])
    return tree


def _has(node: Any, key: Any) -> bool:
    return key in node if isinstance(node, dict) else key < len(node)


def _places(tree: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    waiting = [tree]
    while waiting and len(found) < 5000:
        node = waiting.pop()
        keys = list(node) if isinstance(node, dict) else list(range(len(node))) if isinstance(node, list) else []
        found += [(node, key) for key in keys]
        waiting += [node[key] for key in keys]
    return found


def garble(content: bytes, rng: random.Random) -> bytes:
    """Returns bytes with a few of them flipped, cut, repeated, or replaced by something odd."""
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(content) + 1), rng.randint(1, 40)
        match rng.randrange(5):
            case 0:
                content = content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
            case 1:
                content = content[:at] + content[at + length :]
            case 2:
                content = content[:at] + content[at : at + length] * rng.randint(2, 50) + content[at + length :]
            case 3:
                content = content[:at] + rng.choice(FRAGMENTS) + content[at:]
            case 4:
                content = content[:at]
    return content


FRAGMENTS = [
    b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"&a", b"*a", b"<<: *a\n", b"!!int x", b"!!python/object:x ", b"[" * 2000,
    b"{" * 2000, b"9" * 5000, b"010", b"1:30", b"? ", b": ", b"- ", b"| \n", b"\t", b'"\\ud800"', b"---\n",
    b"%YAML 9\n", b"\x1b[31m", b"1e999", b"-", b"}", b"]", b"\n", b'"', b"NaN", b"null",
]  # fmt: skip


def put(file: Path, content: bytes, rng: random.Random) -> None:
    """Replaces a file by content, or now and then by something that is no regular file."""
    odd = rng.randrange(40)
    file.unlink(missing_ok=True)
    if odd == 0:
        os.mkfifo(file)
    elif odd == 1:
        file.symlink_to("/dev/zero")
    elif odd == 2:
        file.symlink_to("/etc/hostname")
    elif odd == 3:
        file.mkdir()
    else:
        file.write_bytes(content)


def mutated_json(file: Path, rng: random.Random, seal: Callable[[dict[str, Any]], bytes] | None = None) -> bytes:
    """Returns the mutated content of a JSON file; `seal` gives it a new digest, as whoever made it could."""
    if rng.randrange(4) == 0:
        return garble(file.read_bytes(), rng)
    tree = json.loads(file.read_bytes())
    if seal is not None:
        tree.pop("digest")
    tree = mutate(tree, rng)
    return seal(tree) if seal is not None and isinstance(tree, dict) else json.dumps(tree).encode()


def _sealed(separators: tuple[str, str] | None) -> Callable[[dict[str, Any]], bytes]:
    def seal(tree: dict[str, Any]) -> bytes:
        digest = hashlib.sha256(json.dumps(tree, sort_keys=True, separators=separators).encode()).hexdigest()
        return json.dumps({**tree, "digest": digest}).encode()

    return seal


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
    from pipeline.launch.submit.submit import dry_run, plan_chain

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
        put(manifest, mutated_json(manifest, rng, _sealed((",", ":"))), rng)
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
        put(manifest, mutated_json(manifest, rng, _sealed(None)), rng)
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


KINDS: dict[str, Callable[[random.Random, Path], None]] = {
    "config": config, "site": site, "dataset": dataset, "checkpoint": checkpoint, "run": run, "tokenizer": tokenizer,
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


def make(folder: Path) -> None:
    """Makes what is mutated: a dataset, a run with a checkpoint, two tokenizers."""
    from pipeline.checkpoint.pending import take_over
    from pipeline.data.build.build import prepare
    from pipeline.run.folder import Run, create_run
    from tests.checkpoint.support import save
    from tests.data.helpers import config as data_config
    from tests.data.helpers import documents, jsonl, trained, write

    write(folder / "a.jsonl", jsonl(documents(60, seed=1)))
    source = {"name": "a", "paths": [str(folder / "a.jsonl")]}
    made = data_config(folder / "dataset", [source], slice_size_mb=0.004, validation_fraction=0.2)
    prepare(made)
    created = create_run(made.model_copy(update={"runs_dir": str(folder), "name": "run"}))
    assert isinstance(created, Run)
    take_over(created.checkpoints, "a1")
    for step in (1, 2):
        save(created.checkpoints, step, val_loss=1.0)
    moment = 1.7e9
    metrics = [
        {"step": step, "time": moment + step, "train/loss": 3.0, "time/step_s": 0.1, "time/data_s": 0.01,
         "train/lr": 0.1, "train/tokens_per_s": 9.0, "val/loss": 3.0, "train/tokens_seen": 9}
        for step in (1, 2, 3)
    ]  # fmt: skip
    events = [
        {"time": moment, "event": "submitted", "jobs": ["12"], "site": "here"},
        {"time": moment + 1, "event": "attempt", "number": 1, "step": 0, "reached": 0, "began": moment, "host": "h"},
        {"time": moment + 2, "event": "started", "step": 0, "world_size": 1},
        {"time": moment + 3, "event": "checkpointed", "step": 2, "path": "p", "digest": "ab", "stall_s": 0.1},
        {"time": moment + 4, "event": "spike", "step": 2, "loss": "9", "norm": "1", "batch": 2, "path": "p"},
        {"time": moment + 5, "event": "rollback", "step": 2, "to": 1, "skipped": [1]},
        {"time": moment + 6, "event": "repeating", "step": 1, "reached": 2},
        {"time": moment + 7, "event": "failed", "step": 2, "error": "e"},
    ]
    job = {"id": "12", "stage": "train", "tasks": 1, "submitted": moment, "site": "here", "accounting": False,
           "shared": False, "name": "run-train"}  # fmt: skip
    image = {"path": "i", "sha256": "ab", "code": "image"}
    start = {"time": "t", "git": {"commit": "c", "dirty": False}, "image": image, "host": "h", "packages": {"a": "1"}}
    state = {"identity": "i", "attempt": 1, "status": "FAILED", "ended": moment, "store": "sqlite:////nowhere/m.db",
             "stores": {"sqlite:////nowhere/m.db": {"run_id": "r", "sent": 5, "system": {"h": 3}}}}  # fmt: skip
    files: dict[str, Any] = {
        "provenance.json": {"starts": [start]},
        "evaluation.json": {"step": 2, "loss": 3.0, "perplexity": 20.0, "bits_per_byte": 1.5, "tokens": 100},
        "launch/jobs.json": {"jobs": [job]},
        "mlflow.json": state,
    }
    for name, tree in files.items():
        write(created.path / name, json.dumps(tree).encode())
    attempts = [{"time": moment, "event": "began", "stage": "train", "job": "12", "attempt": 0, "nodes": "n[1-2]"}]
    for name, lines in {
        "metrics.jsonl": metrics, "events.jsonl": events, "launch/attempts.jsonl": attempts,
    }.items():  # fmt: skip
        write(created.path / name, "".join(json.dumps(line) + "\n" for line in lines).encode())
    write(created.path / "samples" / "step_00000002.txt", b"The sample.\n")
    write(folder / "bpe.json", trained().encode())
    words = {
        "added_tokens": [{"id": 3, "content": "<|endoftext|>", "special": True, "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False}],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}]},
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "\\w+|[^\\w\\s]+"}, "behavior": "Isolated",
                          "invert": False},
        "post_processor": None, "decoder": None, "version": "1.0", "truncation": None, "padding": None,
        "model": {"type": "WordLevel", "vocab": {"war": 0, "and": 1, "<unk>": 2, "<|endoftext|>": 3},
                  "unk_token": "<unk>"},
    }  # fmt: skip
    write(folder / "words.json", json.dumps(words).encode())


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    seen = failures(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    print("\n".join(seen))
    print(f"{len(seen)} failures, {time.process_time():.1f} s of CPU time")
    sys.exit(1 if seen else 0)
