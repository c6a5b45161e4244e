"""Builds a dataset from its sources, or what is missing of it; the result does not depend on interruptions."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pipeline.config.sections import Config
from pipeline.data.build.assemble import make_manifest
from pipeline.data.build.make_tokenizer import dtype_of_ids, open_tokenizer, too_small
from pipeline.data.build.memory import WordCaches
from pipeline.data.build.resume import (
    PlanGuard,
    reconcile_plan,
    record_plan,
    refuse_changed_content,
    refuse_older_version,
    touched_files,
)
from pipeline.data.build.slice_store import Record, any_published, finished, read_records, remove_leftovers
from pipeline.data.build.slice_writer import SliceWriter
from pipeline.data.build.tasks import Plan, make_plan, share, task_bytes
from pipeline.data.layout import MANIFEST, TOKENIZER
from pipeline.data.manifest import DatasetManifest
from pipeline.data.read.chunks import Chunk
from pipeline.data.read.prefetch import prefetch
from pipeline.data.read.sources import stamp_of
from pipeline.data.read.task import FileSpan, Task
from pipeline.data.read.task_reader import read_task
from pipeline.data.tokenize.tokenizer import Tokenizer
from pipeline.errors import DataError, UsageError
from pipeline.files import sha256_bytes


@dataclass(frozen=True)
class BuildProgress:
    """What a build reports while it works."""

    phase: Literal["tokenizer", "slices", "done"]
    done: int = 0
    """Bytes of the sources that were read."""
    total: int = 0
    """Bytes of the sources that this call must read."""
    message: str | None = None
    """A notice for the user."""


OnProgress = Callable[[BuildProgress], None]


def prepare(
    config: Config, *, slice_spec: tuple[int, int] | None = None, progress: OnProgress | None = None
) -> DatasetManifest | None:
    """Builds the dataset at `config.data.path`, or what is missing of it.

    Args:
        config: The experiment.
        slice_spec: Part `I` of `N`, from 1, for several processes that share the work.
        progress: Called from several threads during the work.

    Returns:
        The manifest; None if other parts are still missing.

    Raises:
        DataError: The text, the tokenizer or the content of the folder cannot be used; nothing half-written stays.
        UsageError: The part does not exist.
    """
    if slice_spec is not None and not 1 <= slice_spec[0] <= slice_spec[1]:
        raise UsageError(f"--slice {slice_spec[0]}/{slice_spec[1]}: there is no such part; I must be from 1 to N")
    report = progress or (lambda _: None)
    folder = Path(config.data.path)
    if config.data.token_folder is not None:
        manifest = DatasetManifest.load(folder)  # others made the tokens, and there is no text
        manifest.tokens_in(folder, config.data.token_folder)
        report(BuildProgress("done"))
        return manifest
    with _writable(folder):
        while True:
            try:
                return _prepare(config, folder, slice_spec, report)
            except FileNotFoundError as error:
                # Another process with the same work has finished the dataset and removed all temporary files, including
                # this process's. It publishes the manifest first, so a second look finds what is left to do.
                if not (_is_inside(folder, error) and (folder / MANIFEST).exists()):
                    raise


def _prepare(
    config: Config, folder: Path, slice_spec: tuple[int, int] | None, report: OnProgress
) -> DatasetManifest | None:
    plan = make_plan(config)
    recorded = reconcile_plan(folder, plan, any_published(folder))
    touched = touched_files(recorded, plan)
    plan = replace(plan, version=recorded.version)
    guard = PlanGuard(folder, plan)
    tokenizer = _open_tokenizer(config, plan, folder, report)
    build = _Build(config, plan, folder, tokenizer, report, guard)
    build.refuse_unusable(touched)
    if touched:
        _record_stamps(folder, plan)
    build.run(share(plan.tasks, slice_spec))
    return build.assemble()


class _Build:
    """One build by this process: checks the published slices, writes the missing ones, assembles the manifest."""

    def __init__(
        self, config: Config, plan: Plan, folder: Path, tokenizer: Tokenizer, report: OnProgress, guard: PlanGuard
    ) -> None:
        self._config = config
        self._plan = plan
        self._folder = folder
        self._tokenizer = tokenizer
        self._report = report
        self._dtype = dtype_of_ids(config, tokenizer)
        self._cores = len(os.sched_getaffinity(0))
        self._caches = WordCaches(tokenizer, self._cores)
        self._build = sha256_bytes(json.dumps([plan.settings, tokenizer.digest], sort_keys=True).encode())
        self._guard = guard
        self._bytes = task_bytes(plan)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._done = self._total = 0
        self._finished: dict[int, list[Record]] = {}

    def refuse_unusable(self, touched: set[tuple[int, int]]) -> None:
        """Refuses slices whose sources changed or that skipped records where `on_bad` is now `error`."""
        records = {task.number: self._records(task) for task in self._plan.tasks}
        if touched:
            refuse_changed_content(self._config, self._plan, touched, records)
        skipped = next((r for found in records.values() for r in found if any(r["bad"].values())), None)
        if skipped is not None and self._config.data.on_bad == "error":
            raise DataError(
                f"{self._folder}: slice {skipped['slice']} was made with data.on_bad=skip and skipped records "
                f"({skipped['bad']}); set data.on_bad=skip again, or remove the folder to start over"
            )

    def run(self, tasks: list[Task]) -> None:
        """Does the unfinished tasks on all cores."""
        missing = [t for t in tasks if not finished(self._records(t))]
        if not missing:
            return
        refuse_older_version(self._folder, self._plan)
        self._total = sum(self._bytes[t.number] for t in missing)
        self._report(BuildProgress("slices", 0, self._total))
        # Each worker has a second thread that prefetches; more encoders would only fill more word caches. Both last
        # for the whole build, because each new thread may begin a heap of its own, and heaps keep what was freed.
        workers = min(self._cores, len(missing))
        with (
            ThreadPoolExecutor(workers, thread_name_prefix="read") as readers,
            ThreadPoolExecutor(workers, thread_name_prefix="prepare") as pool,
        ):
            futures = [pool.submit(self._do, task, len(missing) < self._cores, readers) for task in missing]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                self._stop.set()
                for future in futures:
                    future.cancel()
            for future in futures:
                if not future.cancelled():
                    future.result()

    def _do(self, task: Task, parallel: bool, readers: ThreadPoolExecutor) -> None:
        """Does one task: publishes a slice at its end; for a stream, also after each piece."""
        done = self._records(task)
        if finished(done):
            return  # another process finished it since `run` looked
        resume_at = done[-1]["pieces"][-1].stop if done else 0
        files = self._plan.files[task.source]
        events = read_task(task, self._config.data.sources[task.source], files, self._config.data, resume_at)
        part, more = len(done), True
        with prefetch(events, readers) as waiting:
            while more and not self._stop.is_set():
                with self._writer(task, part) as writer:
                    more = self._fill(task, writer, waiting, parallel)
                part += 1

    def _fill(self, task: Task, writer: SliceWriter, events: Iterator[Chunk | FileSpan], parallel: bool) -> bool:
        """Writes one slice; returns whether the task has another."""
        pieces: list[FileSpan] = []
        for event in events:
            if self._stop.is_set():
                return False
            if isinstance(event, Chunk):
                writer.add(event, parallel)
                self._caches.encoded(event.documents.text_bytes)
                self._count(event)
                continue
            pieces.append(event)
            if task.kind == "stream":
                break
        last = pieces[-1].last
        self._refuse_touched(task, pieces)
        self._guard.check()
        writer.publish(pieces, last)
        return not last

    def _refuse_touched(self, task: Task, pieces: list[FileSpan]) -> None:
        """Refuses files that changed since they were planned: a slice must not mix two versions of a file."""
        for piece in pieces:
            file = self._plan.files[task.source][piece.file]
            if stamp_of(file.path) != file.stamp:
                raise DataError(
                    f"{file.path}: was changed while it was read; run `pipeline prepare` again once it is stable"
                )

    def _records(self, task: Task) -> list[Record]:
        if task.number not in self._finished:
            found = read_records(self._folder, task.number, self._build, self._dtype)
            if not finished(found):
                return found
            self._finished[task.number] = found
        return self._finished[task.number]

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
            files=[self._plan.files[task.source][number].path for number in task.files],
        )

    def _count(self, chunk: Chunk) -> None:
        with self._lock:
            self._done += chunk.bytes_read
            self._report(BuildProgress("slices", self._done, self._total))

    def assemble(self) -> DatasetManifest | None:
        """Writes the manifest if every slice is published; None if one is missing."""
        records: list[Record] = []
        for task in self._plan.tasks:
            found = self._records(task)
            if not finished(found):
                return None
            records += found
        manifest = make_manifest(records, self._plan, self._config.data, self._tokenizer, self._dtype)
        # In this order: a process whose temporary file was removed can rely on a published manifest.
        manifest.save(self._folder)
        remove_leftovers(self._folder)
        self._report(BuildProgress("done"))
        return manifest


def _record_stamps(folder: Path, plan: Plan) -> None:
    """Records the new stamps of files whose content did not change, so that the next build need not reread them."""
    if not (folder / MANIFEST).exists():
        record_plan(folder, plan)
        return
    # A finished dataset may lie on a read-only file system.
    with contextlib.suppress(OSError):
        record_plan(folder, plan)


def _open_tokenizer(config: Config, plan: Plan, folder: Path, report: OnProgress) -> Tokenizer:
    if not (folder / TOKENIZER).exists():
        report(BuildProgress("tokenizer"))
    tokenizer = open_tokenizer(config, plan, folder)
    if tokenizer.notice is not None:
        report(BuildProgress("tokenizer", message=tokenizer.notice))
    small = too_small(config, tokenizer)
    if small is not None:
        report(BuildProgress("tokenizer", message=small))
    return tokenizer


@contextlib.contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        if error.filename is not None and not _is_inside(folder, error):
            raise
        raise DataError(
            f"{folder}: the dataset folder cannot be written ({error.strerror or error}); "
            "choose another data.path, or make room"
        ) from error


def _is_inside(folder: Path, error: OSError) -> bool:
    return isinstance(error.filename, str | bytes) and Path(os.fsdecode(error.filename)).is_relative_to(folder)
