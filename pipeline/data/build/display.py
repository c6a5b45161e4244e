"""The console output of a build and of `pipeline inspect`: progress, tables, documents."""

from __future__ import annotations

import re
import sys
import threading
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.status import Status
from rich.table import Table

from pipeline.config.sections import Config
from pipeline.data.build.build import BuildProgress, prepare
from pipeline.data.manifest import DatasetManifest
from pipeline.data.order.packing import Packing, make_packing
from pipeline.errors import UsageError
from pipeline.files import naming
from pipeline.terminal import Terminal
from pipeline.text_format import duration, printable, short

_SECONDS_BETWEEN_LINES = 10.0


class Display:
    """Shows the progress of a build on stderr: a bar on a terminal, elsewhere one line every ten seconds."""

    def __init__(self, verb: str = "prepare", console: Console | None = None) -> None:
        self._verb = verb
        self._console = console or Terminal(file=sys.stderr)
        self._status = Status("making the tokenizer", console=self._console)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._bar.add_task(verb, start=False)
        self._shown: Status | Progress | None = None
        self._lock = threading.Lock()
        self._began: float | None = None
        self._last_line = 0.0

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *error: object) -> None:
        self._show(None)

    def __call__(self, progress: BuildProgress) -> None:
        """Shows one report of a build."""
        if progress.message is not None:
            self._console.print(printable(progress.message), markup=False, highlight=False)
        elif progress.phase == "tokenizer":
            self._show(self._status)
        elif progress.phase == "slices":
            self.bytes(progress.done, progress.total)

    def bytes(self, done: int, total: int) -> None:
        """Shows how many bytes are done."""
        if not self._console.is_terminal:
            self._line(done, total)
            return
        self._bar.start_task(self._task)
        self._bar.update(self._task, completed=done, total=total)
        self._show(self._bar)

    def _show(self, wanted: Status | Progress | None) -> None:
        with self._lock:
            if wanted is self._shown or not self._console.is_terminal:
                return
            if self._shown is not None:
                self._shown.stop()
            if wanted is not None:
                wanted.start()
            self._shown = wanted

    def _line(self, done: int, total: int) -> None:
        with self._lock:
            now = time.monotonic()
            if self._began is None:
                self._began = self._last_line = now
            if now - self._last_line < _SECONDS_BETWEEN_LINES:
                return
            self._last_line = now
        speed = done / (now - self._began)
        left = (total - done) / speed if speed else 0.0
        self._console.print(
            f"{self._verb} {short(done)}B of {short(total)}B, {short(speed)}B/s, {duration(left)} left",
        )


def prepare_here(config: Config, slice_spec: tuple[int, int] | None = None) -> DatasetManifest | None:
    """Builds a dataset, or a part of it, with a progress display and a table at the end; see `build.prepare`."""
    began = time.monotonic()
    with Display() as display:
        manifest = prepare(config, slice_spec=slice_spec, progress=display)
    console = Terminal()
    if manifest is None:
        assert slice_spec is not None
        console.print(
            f"part {slice_spec[0]} of {slice_spec[1]} is done; other parts are still missing", highlight=False
        )
        return None
    console.print(summary_table(manifest, config.data.path))
    if config.data.packing == "best_fit":
        packing = make_packing(Path(config.data.path), config.model.context_length + 1)
        console.print(packing_line(packing), highlight=False)
    console.print(f"{time.monotonic() - began:.1f} s, dataset {manifest.digest[:12]}")
    return manifest


def packing_line(packing: Packing) -> str:
    """Returns what packing made of the training documents."""
    cut, padding = packing.fractions()
    return (
        f"packed into {sum(packing.windows.values()):,} windows of {packing.window} tokens: "
        f"{cut:.2%} of the documents were cut, {padding:.2%} of the places are padding"
    )


def summary_table(manifest: DatasetManifest, title: str) -> Table:
    """Returns a table of documents, tokens, bytes per token, the longest document and the skipped records."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for split in manifest.splits:
        table.add_column(split, justify="right")
    rows = {
        "documents": [f"{s.documents:,}" for s in manifest.splits.values()],
        "tokens": [f"{s.tokens:,}" for s in manifest.splits.values()],
        "bytes of text": [f"{s.bytes:,}" for s in manifest.splits.values()],
        "bytes per token": [f"{s.bytes / s.tokens:.2f}" if s.tokens else "-" for s in manifest.splits.values()],
        "longest document, tokens": [f"{s.longest:,}" for s in manifest.splits.values()],
        "shards": [f"{len(s.shards):,}" for s in manifest.splits.values()],
    }
    for name, cells in rows.items():
        table.add_row(name, *cells)
    table.add_section()
    table.add_row("empty documents, skipped", f"{manifest.empty:,}")
    if any("dropped" in source for source in manifest.sources):
        table.add_row("records dropped by `where`", f"{manifest.dropped:,}")
    table.add_row("bad records, skipped", f"{sum(manifest.bad.values()):,}")
    for reason, count in manifest.bad.items():
        table.add_row(f"  {reason}", f"{count:,}")
    return table


def parse_slice(text: str | None) -> tuple[int, int] | None:
    """Returns `3/8` as `(3, 8)`.

    Raises:
        UsageError: It is not of that form.
    """
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if found is None:
        raise UsageError(f"--slice {text}: must be I/N with I from 1 to N, for example 3/8")
    return int(found[1]), int(found[2])


def inspect_here(
    path: str, split: str, count: int, seed: int, page: str | None, token_folder: str | None = None
) -> None:
    """Prints documents of a dataset and writes a page about it; see `inspect`."""
    from pipeline.data.inspect import draw_documents, write_page

    console = Terminal()
    console.print(summary_table(DatasetManifest.load(path), path))
    for document in draw_documents(path, split, count, seed, token_folder):
        console.rule(
            printable(f"{split} document {document.number:,}, source {document.source}, {document.tokens:,} tokens")
        )
        console.print(shortened(document.text))
    out = Path(page) if page is not None else Path(path) / "inspect.html"
    with naming(out, "the page cannot be written", "choose another place with --html", UsageError):
        write_page(path, out, token_folder)
    console.print(f"written: {out}")


def shortened(text: str, longest: int = 1200) -> str:
    """Returns the beginning and the end of a long text."""
    if len(text) <= longest:
        return text
    return f"{text[: longest // 2]}\n[... {len(text) - longest:,} characters ...]\n{text[-longest // 2 :]}"
