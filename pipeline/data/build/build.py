"""Sources to token shards and a manifest: does what is missing; the result does not depend on interruptions."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, overload

from pipeline.config.sections import Config
from pipeline.data.build.assemble import make_manifest
from pipeline.data.build.changes import refuse_changed_content, touched_files
from pipeline.data.build.make_tokenizer import dtype_of_ids, open_tokenizer
from pipeline.data.build.memory import WordCaches
from pipeline.data.build.resume import PlanGuard, agree, record
from pipeline.data.build.slice_store import Record, any_published, finished, published, remove_leftovers
from pipeline.data.build.slice_writer import SliceWriter
from pipeline.data.build.tasks import Plan, make_plan, share, task_bytes
from pipeline.data.manifest import MANIFEST, TOKENIZER, Manifest
from pipeline.data.read.chunks import Chunk
from pipeline.data.read.prefetch import prefetch
from pipeline.data.read.sources import stamp_of
from pipeline.data.read.task import FileSpan, Task
from pipeline.data.read.task_reader import read_task
from pipeline.data.tokenize.tokenizer import Tokenizer
from pipeline.errors import DataError, UsageError
from pipeline.files import sha256_bytes


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
    with _writable(folder):
        while True:
            try:
                return _prepare(config, folder, slice_spec, report)
            except FileNotFoundError as error:
                # Another process that did the same work has finished the dataset, and cleared the temporary files away,
                # this one's too. It publishes the manifest first, and what is left to do is looked up again.
                if not (_is_inside(folder, error) and (folder / MANIFEST).exists()):
                    raise


def _prepare(config: Config, folder: Path, slice_spec: tuple[int, int] | None, report: Report) -> Manifest | None:
    plan = make_plan(config)
    touched = touched_files(agree(folder, plan, any_published(folder)), plan)
    guard = PlanGuard(folder, plan)
    tokenizer = _open_tokenizer(config, plan, folder, report)
    build = _Build(config, plan, folder, tokenizer, report, guard)
    build.check(touched)
    if touched:
        _record_stamps(folder, plan)
    build.run(share(plan.tasks, slice_spec))
    return build.join()


class _Build:
    """The parts of a build that its steps share."""

    def __init__(
        self, config: Config, plan: Plan, folder: Path, tokenizer: Tokenizer, report: Report, guard: PlanGuard
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

    def check(self, touched: set[tuple[int, int]]) -> None:
        """Refuses what was published from files that are others now, or under a policy that this build has not."""
        records = {task.number: self._published(task) for task in self._plan.tasks}
        if touched:
            refuse_changed_content(self._config, self._plan, touched, records)
        skipped = next((r for found in records.values() for r in found if r["bad"]), None)
        if skipped is not None and self._config.data.on_bad == "error":
            raise DataError(
                f"{self._folder}: slice {skipped['slice']} was made with data.on_bad=skip and skipped records "
                f"({skipped['bad']}); set it again, or remove the folder to start over"
            )

    def run(self, tasks: list[Task]) -> None:
        """Does the tasks that are not done, on all cores."""
        missing = [t for t in tasks if not finished(self._published(t))]
        if not missing:
            return
        self._total = sum(self._bytes[t.number] for t in missing)
        self._report(Progress("slices", 0, self._total))
        # Each has a thread beside it that reads ahead; more encoders would only warm more caches of words.
        with ThreadPoolExecutor(min(self._cores, len(missing)), thread_name_prefix="prepare") as pool:
            futures = [pool.submit(self._do, task, len(missing) < self._cores) for task in missing]
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
        """One task: publishes a slice at its end, and one whenever a piece ends if it is a stream."""
        done = self._published(task)
        if finished(done):
            return  # by another process, since this one looked
        resume_at = done[-1]["pieces"][-1]["stop"] if done else 0
        files = self._plan.files[task.source]
        events = read_task(task, self._config.data.sources[task.source], files, self._config.data, resume_at)
        part, more = len(done), True
        with prefetch(events) as waiting:
            while more and not self._stop.is_set():
                with self._writer(task, part) as writer:
                    more = self._fill(task, writer, waiting, parallel)
                part += 1

    def _fill(self, task: Task, writer: SliceWriter, events: Iterator[Chunk | FileSpan], parallel: bool) -> bool:
        """Writes one slice.

        Returns:
            Whether the task has another one.
        """
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
        """What was read must be what was planned, or a slice could be made of two versions of a file."""
        for piece in pieces:
            file = self._plan.files[task.source][piece.file]
            if stamp_of(file.path) != file.stamp:
                raise DataError(
                    f"{file.path}: was changed while it was read; run `pipeline prepare` again when it is quiet"
                )

    def _published(self, task: Task) -> list[Record]:
        if task.number not in self._finished:
            found = published(self._folder, task.number, self._build, self._dtype)
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
            self._report(Progress("slices", self._done, self._total))

    def join(self) -> Manifest | None:
        """Writes the manifest if every slice is there."""
        records: list[Record] = []
        for task in self._plan.tasks:
            found = self._published(task)
            if not finished(found):
                return None
            records += found
        manifest = make_manifest(records, self._plan, self._config.data, self._tokenizer, self._dtype)
        # In this order: a process whose temporary file is cleared away can rely on the manifest being there.
        manifest.save(self._folder)
        remove_leftovers(self._folder)
        self._report(Progress("done"))
        return manifest


def _record_stamps(folder: Path, plan: Plan) -> None:
    """So that files that were looked at again and hold what they held are not looked at the next time."""
    if not (folder / MANIFEST).exists():
        record(folder, plan)
        return
    # A finished dataset may lie on a file system that nobody writes to.
    with contextlib.suppress(OSError):
        record(folder, plan)


def _open_tokenizer(config: Config, plan: Plan, folder: Path, report: Report) -> Tokenizer:
    if not (folder / TOKENIZER).exists():
        report(Progress("tokenizer"))
    tokenizer = open_tokenizer(config, plan, folder)
    if tokenizer.notice is not None:
        report(Progress("tokenizer", message=tokenizer.notice))
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
