"""The memory of a build does not depend on the size of the corpus."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from benchmarks.processes import measure
from pipeline.config.load import dump_config
from pipeline.data.build import build, memory
from pipeline.data.build.build import prepare
from pipeline.data.build.memory import WordCaches
from pipeline.data.read.chunks import ReadItems
from pipeline.data.read.documents import Documents
from pipeline.data.read.task_reader import read_task
from pipeline.data.tokenize.tokenizer import Tokenizer
from pipeline.data.tokenize.train import train_bpe
from tests.data.helpers import COMPRESS, END, config, dataset_digest, documents, jsonl, write

TEXTS = documents(400, seed=8)


def test_forgetting_words_changes_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = write(tmp_path / "a.jsonl", jsonl(TEXTS))
    made = [
        config(
            tmp_path / name,
            [{"name": "s", "paths": [str(text)]}],
            tokenizer={"kind": "bpe"},
            slice_size_mb=0.004,
            validation_fraction=0.1,
        )
        for name in ("never", "always")
    ]
    prepare(made[0])
    forgotten: list[int] = []
    forget = Tokenizer.clear_caches
    monkeypatch.setattr(Tokenizer, "clear_caches", lambda self: (forgotten.append(1), forget(self)))
    monkeypatch.setattr(memory, "_MIN_TEXT_BETWEEN", 0)
    monkeypatch.setattr(memory, "_ALLOWED_BYTES", -(1 << 40))
    prepare(made[1])
    assert len(forgotten) > 5
    assert dataset_digest(tmp_path / "never") == dataset_digest(tmp_path / "always")


def test_words_are_forgotten_when_memory_has_grown_and_not_too_often(monkeypatch: pytest.MonkeyPatch) -> None:
    resident = 500 << 20
    forgotten: list[int] = []

    class Encoder:
        def clear_caches(self) -> None:
            forgotten.append(resident)

    monkeypatch.setattr(memory, "resident_bytes", lambda: resident)
    caches = WordCaches(Encoder(), workers=2)  # type: ignore[arg-type]
    for _ in range(100):
        caches.encoded(4_000_000)
    assert not forgotten
    resident += 513 << 20
    caches.encoded(4_000_000)
    assert len(forgotten) == 1
    for _ in range(15):  # still too large, but after too little text to blame the words
        caches.encoded(4_000_000)
    assert len(forgotten) == 1
    caches.encoded(4_000_000)
    assert len(forgotten) == 2


def test_memory_is_given_back_once_no_worker_uses_the_old_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    sizes = iter([0, 1 << 40])  # at the start, and after the first chunk
    monkeypatch.setattr(memory, "resident_bytes", lambda: next(sizes))
    monkeypatch.setattr(memory, "return_freed_memory", lambda: events.append("given back"))
    caches = WordCaches(SimpleNamespace(clear_caches=lambda: events.append("forgotten")), workers=3)  # type: ignore[arg-type]
    caches.encoded(1 << 30)
    for _ in range(4):
        caches.encoded(1)
        events.append("chunk")
    assert events == ["forgotten", "chunk", "chunk", "given back", "chunk", "chunk"]


def test_memory_is_given_back_where_words_are_forgotten() -> None:
    made = Tokenizer(train_bpe(b"some words", b"\xff", 300, ["<|endoftext|>"], "gpt2").encode(), "here")
    rng = random.Random(0)

    def encode_new_words() -> int:
        for _ in range(6):
            made.encode_batch(Documents.of([b" ".join(rng.randbytes(6).hex().encode() for _ in range(150_000))]))
        return memory.resident_bytes()

    grown, left = [], []
    for _ in range(4):
        grown.append(encode_new_words())
        made.clear_caches()
        memory.return_freed_memory()
        left.append(memory.resident_bytes())
    # Not the first: a fresh process grows less, by what its heap already holds.
    assert min(before - after for before, after in zip(grown[1:], left[1:], strict=True)) > 40 << 20
    assert max(grown) - grown[1] < 20 << 20
    assert max(left) - left[0] < 20 << 20


def test_the_same_threads_read_all_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readers: list[threading.Thread] = []  # the objects, since the system gives a number again

    def read(*arguments: Any) -> ReadItems:
        readers.append(threading.current_thread())
        yield from read_task(*arguments)

    monkeypatch.setattr(build, "read_task", read)
    text = write(tmp_path / "a.jsonl", jsonl(TEXTS))
    prepare(config(tmp_path / "out", [{"name": "s", "paths": [str(text)]}], slice_size_mb=0.002))
    assert len(readers) > 10
    assert len(set(readers)) <= len(os.sched_getaffinity(0))


def test_devoting_a_process_to_a_build_imports_no_numpy() -> None:
    code = "import sys, pipeline.data.build.memory as m; m.devote_process(); sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


_IN_THREADS = """
import sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pipeline.data.build.memory import devote_process
devote_process()
from pipeline.data.tokenize.tokenizer import Tokenizer

tokenizer = Tokenizer(Path(sys.argv[1]).read_bytes(), "here")
texts = ["one way or another, of the people, by the people, for the people " * 20] * 2000
tokenizer.reference_encode(texts[:10])
for threads in (1, 2):
    began = time.process_time()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(tokenizer.reference_encode, [texts] * threads))
    print((time.process_time() - began) / threads)
"""


@pytest.mark.timing
def test_workers_that_encode_by_tokenizers_do_not_wait_for_each_other(tmp_path: Path) -> None:
    vocabulary = write(tmp_path / "tokenizer.json", train_bpe(b"of the people", b"\xff", 260, [END], "gpt2").encode())
    done = subprocess.run(
        [sys.executable, "-c", _IN_THREADS, str(vocabulary)], check=True, capture_output=True, text=True
    )
    alone, beside_another = map(float, done.stdout.split())
    assert beside_another < 1.7 * alone, "with one heap for all threads each waits for the others' allocations"


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["txt", "jsonl", "jsonl.zst", "parquet"])
def test_eight_times_the_text_takes_the_same_memory(ending: str, tmp_path: Path) -> None:
    sample = b"\xff".join(text.encode() for text in TEXTS)
    vocabulary = train_bpe(sample, b"\xff", 300, ["<|endoftext|>"], "gpt2")
    tokenizer = write(tmp_path / "tokenizer.json", vocabulary.encode())
    peaks = []
    for number, times in enumerate((8, 8, 64)):  # a peak depends by some 20 MB on how the threads met
        path = tmp_path / f"{number}.{ending}"
        _write_megabytes(path, 20 * times)
        entry = {"name": "s", "paths": [str(path)], **({"separator": "\x1e"} if ending == "txt" else {})}
        made = config(
            tmp_path / f"out{number}",
            [entry],
            tokenizer={"kind": "file", "path": str(tokenizer)},
            slice_size_mb=8.0,
            validation_fraction=0.01,
        )
        file = write(tmp_path / f"{number}.yaml", dump_config(made).encode())
        peaks.append(measure([sys.executable, "-m", "pipeline", "prepare", str(file)]).peak_mb)
    print(peaks)
    assert max(peaks) < 600
    assert peaks[2] - max(peaks[:2]) < 50


def _write_megabytes(path: Path, megabytes: int) -> None:
    """Writes the same texts repeatedly: the corpus grows, its vocabulary does not."""
    texts = documents(1_000_000 // 500, seed=3, longest=160)
    kind = path.suffixes[0]
    if kind == ".parquet":
        table = pyarrow.table({"text": texts})
        with pyarrow.parquet.ParquetWriter(path, table.schema) as writer:
            for _ in range(1_000_000 * megabytes // table.nbytes):
                writer.write_table(table)
        return
    once = jsonl(texts) if kind == ".jsonl" else "\x1e".join([*texts, ""]).encode()
    packed = COMPRESS["zst"](once) if path.suffix == ".zst" else once
    path.write_bytes(packed * (1_000_000 * megabytes // len(once)))
