"""Sources to token shards and a manifest: does what is missing; the result does not depend on interruptions."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import numpy as np

from pipeline.config import Config
from pipeline.data.bad import check_fraction
from pipeline.data.manifest import SPLITS, TOKENIZER, Manifest, Shard, Split
from pipeline.data.plan import Plan, Task, agree, make_plan, share
from pipeline.data.readers import Chunk, Piece, read_task
from pipeline.data.slices import SliceWriter, published, remove_leftovers
from pipeline.data.tokenizer import Tokenizer
from pipeline.data.vocabulary import make_tokenizer
from pipeline.errors import DataError, UsageError
from pipeline.files import sha256_bytes, write_bytes

T = TypeVar("T")


@dataclass(frozen=True)
class Progress:
    """What a build reports while it works.

    Attributes:
        phase: `tokenizer`, `slices` or `done`.
        done: Bytes of the sources that were read.
        total: Bytes of the sources to be read by this call.
        message: Something that the user must be told, or None.
    """

    phase: Literal["tokenizer", "slices", "done"]
    done: int = 0
    total: int = 0
    message: str | None = None


Report = Callable[[Progress], None]


@overload
def prepare(config: Config, *, slice_spec: None = None, progress: Report | None = None) -> Manifest: ...


@overload
def prepare(
    config: Config, *, slice_spec: tuple[int, int] | None, progress: Report | None = None
) -> Manifest | None: ...


def prepare(
    config: Config, *, slice_spec: tuple[int, int] | None = None, progress: Report | None = None
) -> Manifest | None:
    """Builds the dataset `config.data.path`, or what is missing of it.

    Args:
        config: The experiment.
        slice_spec: Part `I` of `N`, from 1, for several processes that share the work.
        progress: Called while the work goes on, from several threads.

    Returns:
        The manifest; None if other parts are still missing.

    Raises:
        DataError: The text, the tokenizer or what is in the folder already cannot be used; nothing half-written stays.
        UsageError: The part does not exist.
    """
    if slice_spec is not None and not 1 <= slice_spec[0] <= slice_spec[1]:
        raise UsageError(f"--slice {slice_spec[0]}/{slice_spec[1]}: is no part, allowed: I/N with I from 1 to N")
    report = progress or (lambda _: None)
    folder = Path(config.data.path)
    plan = make_plan(config)
    with _writable(folder):
        plan = agree(folder, plan)
        tokenizer = _tokenizer(config, plan, folder, report)
        build = _Build(config, plan, folder, tokenizer, report)
        build.run(share(plan.tasks, slice_spec))
        return build.join()


class _Build:
    """The parts of a build that its steps share."""

    def __init__(self, config: Config, plan: Plan, folder: Path, tokenizer: Tokenizer, report: Report) -> None:
        self._config = config
        self._plan = plan
        self._folder = folder
        self._tokenizer = tokenizer
        self._report = report
        self._dtype = _dtype(config, tokenizer)
        self._build = sha256_bytes(json.dumps([plan.settings, tokenizer.digest], sort_keys=True).encode())
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._done = self._total = self._records = 0
        self._bad: Counter[str] = Counter()

    def run(self, tasks: list[Task]) -> None:
        """Does the tasks that are not done, on all cores."""
        missing = [t for t in tasks if not _finished(published(self._folder, t.number, self._build))]
        if not missing:
            return
        self._total = sum(self._plan.files[t.source][f].size for t in missing for f in t.files)
        cores = len(os.sched_getaffinity(0))
        # One more than there are cores: somebody waits for the disk at any time.
        with ThreadPoolExecutor(min(cores + 1, len(missing)), thread_name_prefix="prepare") as pool:
            futures = [pool.submit(self._do, task, len(missing) < cores) for task in missing]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                self._stop.set()
                for future in futures:
                    future.cancel()
            for future in futures:
                if not future.cancelled():
                    future.result()

    def _do(self, task: Task, parallel: bool) -> None:
        source = self._config.data.sources[task.source]
        files = self._plan.files[task.source]
        pieces: list[Piece] = []
        with self._writer(task, 0) as writer, _ahead(read_task(task, source, files, self._config.data)) as events:
            for event in events:
                if self._stop.is_set():
                    return
                if isinstance(event, Piece):
                    pieces.append(event)
                    continue
                writer.add(event, parallel)
                self._count(event)
            writer.publish(pieces, last=True)

    def _writer(self, task: Task, part: int) -> SliceWriter:
        return SliceWriter(
            self._folder,
            task.number,
            part,
            source=self._config.data.sources[task.source],
            tokenizer=self._tokenizer,
            dtype=self._dtype,
            validation_fraction=self._config.data.validation_fraction,
            build=self._build,
        )

    def _count(self, chunk: Chunk) -> None:
        with self._lock:
            self._done += chunk.read
            self._records += chunk.records
            self._bad.update(chunk.bad)
            check_fraction(self._bad, self._records, self._config.data.max_bad_fraction, final=False)
            self._report(Progress("slices", self._done, self._total))

    def join(self) -> Manifest | None:
        """Writes the manifest if every slice is there."""
        records = []
        for task in self._plan.tasks:
            found = published(self._folder, task.number, self._build)
            if not _finished(found):
                return None
            records += found
        manifest = self._manifest(records)
        remove_leftovers(self._folder)
        manifest.save(self._folder)
        self._report(Progress("done"))
        return manifest

    def _manifest(self, records: list[dict[str, Any]]) -> Manifest:
        bad = sum((Counter(r["bad"]) for r in records), Counter())
        check_fraction(bad, sum(r["records"] for r in records), self._config.data.max_bad_fraction, final=True)
        shards = [Shard(**shard) for record in records for shard in record["shards"]]
        if not any(s.split == "train" for s in shards):
            raise DataError(
                f"{self._folder}: the sources hold no document for training; look at `paths` and `separator`"
            )
        sources = tuple(
            _source_entry(source.name, files, [r for r in records if r["source"] == source.name])
            for source, files in zip(self._config.data.sources, self._plan.files, strict=True)
        )
        return Manifest(
            dtype=self._dtype.name,
            tokenizer_digest=self._tokenizer.digest,
            vocab_size=self._tokenizer.vocab_size,
            end_of_text_id=self._tokenizer.end_of_text_id,
            encoder=self._tokenizer.encoder,
            splits={name: Split(name, tuple(s for s in shards if s.split == name)) for name in SPLITS},
            sources=sources,
            settings=self._plan.settings,
        )


def _tokenizer(config: Config, plan: Plan, folder: Path, report: Report) -> Tokenizer:
    file = folder / TOKENIZER
    if not file.exists():
        report(Progress("tokenizer"))
        write_bytes(file, make_tokenizer(config, plan))
    tokenizer = Tokenizer.load(file, config.tokenizer.end_of_text)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise DataError(
            f"{file}: has {tokenizer.vocab_size} tokens, model.vocab_size is {config.model.vocab_size}; "
            f"set it to {tokenizer.vocab_size} or more"
        )
    if tokenizer.notice is not None:
        report(Progress("tokenizer", message=tokenizer.notice))
    return tokenizer


def _dtype(config: Config, tokenizer: Tokenizer) -> np.dtype[Any]:
    fits = tokenizer.vocab_size <= 1 << 16
    if config.data.dtype == "uint16" and not fits:
        raise DataError(
            f"data.dtype: uint16 holds 65536 ids, the tokenizer has {tokenizer.vocab_size}; use uint32 or auto"
        )
    wide = config.data.dtype == "uint32" or not fits
    return np.dtype("<u4" if wide else "<u2")


def _finished(records: list[dict[str, Any]]) -> bool:
    return bool(records) and records[-1]["last"]


def _source_entry(name: str, files: Any, records: list[dict[str, Any]]) -> dict[str, Any]:
    pieces: dict[int, list[dict[str, Any]]] = {}
    for record in records:
        for piece in record["pieces"]:
            pieces.setdefault(piece["file"], []).append(piece)
    return {
        "name": name,
        "records": sum(r["records"] for r in records),
        "empty": sum(r["empty"] for r in records),
        "bad": dict(sorted(sum((Counter(r["bad"]) for r in records), Counter()).items())),
        "cross_checked": sum(r["cross_checked"] for r in records),
        "files": [
            {"path": file.path, "size": file.size, **_content_digest(pieces.get(number, []))}
            for number, file in enumerate(files)
        ],
    }


def _content_digest(pieces: list[dict[str, Any]]) -> dict[str, Any]:
    if len(pieces) == 1:
        return {"sha256": pieces[0]["sha256"]}
    return {"sha256_of_pieces": [[p["start"], p["stop"], p["sha256"]] for p in pieces]}


@contextlib.contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        if error.filename is not None and not str(error.filename).startswith(str(folder)):
            raise
        raise DataError(
            f"{folder}: the dataset folder cannot be written ({error.strerror or error}); "
            "choose another data.path, or make room"
        ) from error


@contextlib.contextmanager
def _ahead(events: Iterator[T], depth: int = 2) -> Iterator[Iterator[T]]:
    """Runs an iterator in a thread of its own, up to `depth` items ahead, so that reading and encoding overlap."""
    items: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: tuple[str, Any]) -> bool:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                items.put(item, timeout=0.1)
                return True
        return False

    def work() -> None:
        try:
            for event in events:
                if not put(("event", event)):
                    return
            put(("end", None))
        except BaseException as error:  # handed over to the thread that waits for the items
            put(("error", error))

    def take() -> Iterator[T]:
        while True:
            kind, value = items.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value

    thread = threading.Thread(target=work, name="prepare-read", daemon=True)
    thread.start()
    try:
        yield take()
    finally:
        stopped.set()
        thread.join()
