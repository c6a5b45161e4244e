"""An adopted dataset holds the documents of the files, which stay where they are, and is checked like our own."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.adopt import adopt as adopt_module
from pipeline.data.adopt import pieces
from pipeline.data.adopt.adopt import adopt
from pipeline.data.adopt.find import FormatName, find_sources
from pipeline.data.dataset import open_splits
from pipeline.data.inspect import draw_documents, write_page
from pipeline.data.manifest import DatasetManifest
from pipeline.data.tokenize.tokenizer import Tokenizer
from pipeline.data.verify import verify_dataset
from pipeline.errors import DataError, UsageError
from tests.data.adopt.foreign import DOCUMENTS, END, TEXTS, flat, tokens_of, write_megatron, write_olmo, write_raw
from tests.data.helpers import tree_digest, write

WITHOUT_ENDS = [document[:-1] for document in DOCUMENTS]


def _npy(path: Path, found: Any = DOCUMENTS) -> Path:
    np.save(path, np.array(flat(found), np.uint16))
    return path


WRITERS: dict[str, tuple[FormatName, str, Callable[..., Path], str | None]] = {
    "megatron": ("megatron", "in/a.bin", write_megatron, None),
    "raw": ("raw", "in/a.bin", write_raw, "uint16"),
    "npy": ("npy", "in/a.npy", _npy, None),
    "olmo": ("olmo", "in/a.npy", write_olmo, "uint16"),
}


def adopted(
    folder: Path, kind: str, fraction: float = 0.1, found: Any = DOCUMENTS, paths: tuple[str, ...] = (), **given: Any
) -> DatasetManifest:
    """Writes documents in one format and adopts them as `folder / out`."""
    format_name, name, writer, dtype = WRITERS[kind]
    (folder / "in").mkdir(exist_ok=True)
    made = [str(writer(folder / name, found))] if not paths else list(paths)
    sources = find_sources(format_name, made, given.pop("validation", ()), given.pop("dtype", dtype))
    tokenizer = Tokenizer.load(tokens_of(folder))
    return adopt(sources, format_name, tokenizer, folder / "out", fraction, lambda done, total: None)


def documents_of(manifest: DatasetManifest, folder: Path, tokens_in: Path, split: str) -> list[list[int]]:
    """The documents of a split as its shards and indices say."""
    found = []
    for shard in manifest.splits[split].shards:
        tokens = np.memmap(tokens_in / shard.file, manifest.numpy_dtype, "r", shard.offset, (shard.tokens,))
        index = np.fromfile(folder / shard.index, "<u8").astype(int).tolist()
        assert index[0] == 0 and index[-1] == shard.tokens
        found += [tokens[a:b].tolist() for a, b in itertools.pairwise(index)]
    return found


@pytest.fixture(params=[1 << 30, 4000])
def piece_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(pieces, "PIECE_BYTES", request.param)
    return int(request.param)


@pytest.mark.parametrize("kind", WRITERS)
def test_the_documents_are_those_of_the_files(kind: str, piece_bytes: int, tmp_path: Path) -> None:
    manifest = adopted(tmp_path, kind)
    both = [documents_of(manifest, tmp_path / "out", tmp_path / "in", split) for split in ("train", "validation")]
    assert both[0] + both[1] == DOCUMENTS
    total = len(flat(DOCUMENTS))
    assert 0.05 < len(flat(both[1])) / total <= 0.1
    assert manifest.splits["train"].bytes == sum(len(d) - 1 for d in both[0])
    assert (len(manifest.shards) > 10) == (piece_bytes < 1 << 20)
    assert manifest.sources[0]["ended_documents"] == len(DOCUMENTS) and manifest.sources[0]["inner_ends"] == 0
    assert DatasetManifest.load(tmp_path / "out") == manifest


@pytest.mark.parametrize("kind", WRITERS)
def test_tokens_stay_in_place_and_only_the_named_folder_is_read(kind: str, tmp_path: Path) -> None:
    manifest = adopted(tmp_path, kind)
    assert manifest.adopted == {"format": kind, "folder": str(tmp_path / "in")}
    assert sum(p.stat().st_size for p in (tmp_path / "out").rglob("*.bin")) == 0
    opened = open_splits(tmp_path / "out", token_folder=str(tmp_path / "in"), verify=True, vocab_size=257)
    stream = opened["train"].stream
    assert stream.gather(np.array([0]), stream.tokens)[0].tolist() == flat(DOCUMENTS)[: stream.tokens]
    for read in (open_splits, verify_dataset, lambda path: draw_documents(path, "train", 3, 0)):
        with pytest.raises(DataError, match=rf"{tmp_path}/out: .*not read unless"):
            read(tmp_path / "out")
    with pytest.raises(DataError, match=r"other/a\.(bin|npy): "):
        open_splits(tmp_path / "out", token_folder=str(tmp_path / "other"))


def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    adopted(tmp_path, "raw")
    secret = write(tmp_path / "secret", (tmp_path / "in" / "a.bin").read_bytes())
    (tmp_path / "in" / "a.bin").unlink()
    (tmp_path / "in" / "a.bin").symlink_to(secret)
    with pytest.raises(DataError, match=r"a\.bin: .*link"):
        open_splits(tmp_path / "out", token_folder=str(tmp_path / "in"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (b"in/\xff.bin", r"in/\\xff\.bin: .*not UTF-8.*; rename the file"),
        (b"in\xff/a.bin", r"in\\xff/a\.bin: .*not UTF-8.*; rename the file"),
        (b"in/.hidden/a.bin", r"a\.bin: .* '\.hidden/a\.bin': below .*/in .*a dot; rename it"),
        (b"in/a\nb.bin", r"(?s)a\nb\.bin: .* 'a\\nb\.bin': .*; rename it"),
    ],
)
@pytest.mark.parametrize("kind", ["raw", "megatron"])
def test_a_name_that_no_manifest_can_hold_is_refused_before_the_tokens_are_read(
    kind: str, name: bytes, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = WRITERS[kind][2]
    paths = [writer(Path(os.fsdecode(bytes(tmp_path) + b"/" + place)), DOCUMENTS) for place in (b"in/z.bin", name)]
    monkeypatch.setattr(adopt_module, "scan", lambda *_: pytest.fail("read"))
    with pytest.raises(DataError, match=words) as caught:
        adopted(tmp_path, kind, paths=tuple(map(str, paths)))
    str(caught.value).encode()
    assert not (tmp_path / "out").exists() and "manifest.json" not in str(caught.value)


def test_a_hidden_folder_that_holds_all_files_is_not_part_of_their_names(tmp_path: Path) -> None:
    path = write_raw(tmp_path / ".cache" / "a.bin")
    assert adopted(tmp_path, "raw", paths=(str(path),)).shards[0].file == "a.bin"


def test_it_is_inspected_like_any_other(tmp_path: Path) -> None:
    adopted(tmp_path, "megatron", found=WITHOUT_ENDS)
    shown = draw_documents(tmp_path / "out", "train", 20, 0, str(tmp_path / "in"))
    assert [document.text for document in shown] == [TEXTS[document.number] for document in shown]
    write_page(tmp_path / "out", tmp_path / "page.html", str(tmp_path / "in"))
    assert (tmp_path / "page.html").stat().st_size > 1 << 20


@pytest.mark.parametrize("place", ["first", "last", "index"])
def test_a_flipped_bit_is_found(place: str, tmp_path: Path, piece_bytes: int) -> None:
    manifest = adopted(tmp_path, "olmo")
    shard = manifest.shards[-1]
    path = tmp_path / "out" / shard.index if place == "index" else tmp_path / "in" / "a.npy"
    content = bytearray(path.read_bytes())
    content[0 if place == "first" else -1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"(?s)1 of .*{path.name}"):
        verify_dataset(tmp_path / "out", token_folder=str(tmp_path / "in"))


def test_documents_without_end_of_text_are_known_by_the_index(tmp_path: Path, piece_bytes: int) -> None:
    manifest = adopted(tmp_path, "olmo", found=WITHOUT_ENDS)
    both = [documents_of(manifest, tmp_path / "out", tmp_path / "in", split) for split in ("train", "validation")]
    assert both[0] + both[1] == WITHOUT_ENDS
    assert manifest.sources[0]["ended_documents"] == 0


def test_end_of_text_at_some_documents_only_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.bin: 299 of the 300 documents"):
        adopted(tmp_path, "megatron", found=[DOCUMENTS[0], *WITHOUT_ENDS[1:]])


def test_ends_inside_of_documents_and_empty_documents_are_counted(tmp_path: Path) -> None:
    found = [[1, END, 2, END], [], [3, END], *DOCUMENTS]
    manifest = adopted(tmp_path, "megatron", found=found)
    assert (manifest.sources[0]["inner_ends"], manifest.empty, manifest.documents) == (1, 1, len(DOCUMENTS) + 2)


def test_a_file_that_ends_within_a_document_keeps_it(tmp_path: Path, piece_bytes: int) -> None:
    manifest = adopted(tmp_path, "raw", found=[*DOCUMENTS, [1, 2, 3]])
    assert documents_of(manifest, tmp_path / "out", tmp_path / "in", "validation")[-1] == [1, 2, 3]
    assert manifest.documents - manifest.sources[0]["ended_documents"] == 1


def test_files_for_validation_and_several_sources(tmp_path: Path) -> None:
    write_raw(tmp_path / "in" / "web" / "b.bin", DOCUMENTS[:100])
    write_raw(tmp_path / "in" / "web" / "a.bin", DOCUMENTS[100:150])
    write_raw(tmp_path / "in" / "code.bin", DOCUMENTS[150:200])
    write_raw(tmp_path / "in" / "val.bin", DOCUMENTS[200:])
    given = (f"web={tmp_path}/in/web", f"code={tmp_path}/in/c*.bin")
    manifest = adopted(tmp_path, "raw", paths=given, validation=[f"web={tmp_path}/in/val.bin"])
    train, validation = (documents_of(manifest, tmp_path / "out", tmp_path / "in", s) for s in ("train", "validation"))
    assert train[:150] == [*DOCUMENTS[100:150], *DOCUMENTS[:100]] and validation[:100] == DOCUMENTS[200:]
    assert train[150:] + validation[100:] == DOCUMENTS[150:200] and len(validation) > 100
    assert [s.source for s in manifest.shards] == ["web", "web", "code", "web", "code"]


@pytest.mark.parametrize(
    ("found", "words"),
    [([[END]], "tokens: 1"), ([[7]], "tokens: 1, bytes of text: 1"), ([[END]] * 9, "tokens: 9, bytes of text: 0")],
)
def test_a_source_for_validation_that_cannot_be_measured_is_refused(found: Any, words: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_raw(tmp_path / "in" / f"{name}.bin")
    small = write_raw(tmp_path / "in" / "small.bin", found)
    given = (f"web={tmp_path}/in/a.bin", f"code={tmp_path}/in/b.bin")
    with pytest.raises(DataError, match=rf"out: source web .*{words}.*; name other files with --validation"):
        adopted(tmp_path, "raw", paths=given, validation=[f"web={small}"])
    assert not (tmp_path / "out").exists()
    write_raw(small, [[7, END]])
    adopted(tmp_path, "raw", paths=given, validation=[f"web={small}"])


@pytest.mark.parametrize(
    ("kind", "found", "given", "words"),
    [
        ("raw", [[1, 2, 300, END]], {}, r"a\.bin: token 2 .*300.*257"),
        ("megatron", [[1, -2, END]], {}, r"a\.bin: token 1 .*-2"),
        ("raw", DOCUMENTS, {"dtype": "uint32"}, r"a\.bin: token 0 .*dtype"),
        ("raw", DOCUMENTS, {"dtype": "uint8"}, r"a\.bin: uint8 cannot hold .* 256 .*--dtype, "),
        ("raw", [[1, 2, 3] * 50], {}, r"a\.bin: no document"),
    ],
)
def test_tokens_of_another_tokenizer_or_type_are_refused_and_nothing_is_published(
    kind: str, found: Any, given: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=words):
        adopted(tmp_path, kind, found=found, **given)
    assert {p.name for p in tmp_path.iterdir()} == {"in", "tokenizer.json"}


def _large_tokenizer(monkeypatch: pytest.MonkeyPatch, end: int, size: int = 128_001) -> None:
    """Makes the tokenizer one of more tokens than uint16 has numbers."""
    load = Tokenizer.load

    def larger(*given: Any) -> Tokenizer:
        found = load(*given)
        found.vocab_size, found.end_of_text_id = size, end
        return found

    monkeypatch.setattr(Tokenizer, "load", larger)


@pytest.mark.parametrize("end", [1, 128_000])
@pytest.mark.parametrize(("dtype", "wide"), [("uint8", "uint32"), ("uint16", "uint32"), ("uint32", "uint64")])
def test_a_wider_type_than_the_given_one_is_noticed(
    end: int, dtype: str, wide: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    _large_tokenizer(monkeypatch, end)
    found = [[*(n * 997 % 128_000 for n in range(d, d + 40)), end] for d in range(60)]
    path = write_raw(tmp_path / "in" / "a.bin", [[7], *found], wide)
    words = "cannot hold .* 128,000" if end > np.iinfo(dtype).max else f"read as {wide}, "
    with pytest.raises(DataError, match=rf"a\.bin: .*{words}.*--dtype"):
        adopted(tmp_path, "raw", 0, paths=(str(path),), dtype=dtype)
    assert adopted(tmp_path, "raw", 0, paths=(str(path),), dtype=wide).documents == 60


def test_a_wider_type_is_noticed_with_a_small_vocabulary_too(tmp_path: Path) -> None:
    write_raw(tmp_path / "in" / "a.bin", dtype="uint32")
    with pytest.raises(DataError, match=r"a\.bin: read as uint32, "):
        adopted(tmp_path, "raw", paths=(str(tmp_path / "in" / "a.bin"),))


def test_ids_below_65536_of_a_larger_vocabulary_are_adopted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _large_tokenizer(monkeypatch, 1)
    found = [[*(n * 997 % 65_000 + 2 for n in range(d, d + 40)), 1] for d in range(60)]
    assert adopted(tmp_path, "raw", 0, found=found).documents == 60
    shutil.rmtree(tmp_path / "out")
    assert adopted(tmp_path, "olmo", 0, found=[document[:-1] for document in found]).documents == 60


@pytest.mark.parametrize(
    ("kind", "dtype", "paths", "error"),
    [
        ("raw", None, ["a.bin"], UsageError),
        ("megatron", "uint16", ["a.bin"], UsageError),
        ("raw", "uint16", ["gone*.bin"], UsageError),
        ("raw", "uint16", ["a.bin", "x=a.bin"], DataError),
        ("raw", "uint16", ["a.bin", "x=link.bin"], DataError),
        ("raw", "uint16", ["a.bin", "x=hard.bin"], DataError),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    kind: FormatName, dtype: str | None, paths: list[str], error: type[Exception], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    write_raw(tmp_path / "a.bin")
    (tmp_path / "link.bin").symlink_to("a.bin")
    (tmp_path / "hard.bin").hardlink_to("a.bin")
    with pytest.raises(error):
        find_sources(kind, paths, [], dtype)


def test_the_folder_may_move_with_its_tokens(tmp_path: Path) -> None:
    adopted(tmp_path, "raw")
    before = tree_digest(tmp_path / "out")
    shutil.move(tmp_path / "in", tmp_path / "elsewhere")
    verify_dataset(tmp_path / "out", token_folder=str(tmp_path / "elsewhere"))
    assert tree_digest(tmp_path / "out") == before
