"""What cannot be written is named, and nothing half-written stays."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.build.build import prepare
from pipeline.data.build.slice_writer import SliceWriter
from pipeline.errors import DataError
from tests.data.helpers import config, one_source, write


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"text")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        prepare(config(tmp_path / "file" / "out", [one_source(path)]))


@pytest.mark.parametrize("other", ["000000-00000", "000000-00000/train.bin", "000000-00000/slice.json"])
def test_what_has_the_name_of_a_slice_is_named_and_removed_to_resume(
    other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.txt", b"text")
    made = config(tmp_path / "out", [one_source(path)])
    add, place = SliceWriter.add, tmp_path / "out" / "slices" / "000000-00000"

    def overtaken(self: Any, *arguments: Any) -> None:
        add(self, *arguments)
        write(place.parent / other, b"{}")

    with monkeypatch.context() as patch, pytest.raises(DataError, match=f"^{place}: .*; remove the folder {place} and"):
        patch.setattr(SliceWriter, "add", overtaken)
        prepare(made)
    assert [file.name for file in place.parent.iterdir()] == [place.name], "nothing half-written"
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    assert prepare(made) is not None


# Every word is unknown to this tokenizer, and unknown words are its end of text.
_TOKENIZER = """{"version": "1.0", "added_tokens": [{"id": 0, "content": "END", "single_word": false, "lstrip": false,
"rstrip": false, "normalized": false, "special": true}], "normalizer": null, "pre_tokenizer": {"type": "Whitespace"},
"post_processor": null, "decoder": null, "truncation": null, "padding": null,
"model": {"type": "WordLevel", "vocab": {"END": 0, "known": 1}, "unk_token": "END"}}"""


@pytest.mark.parametrize("names", [["a.txt"], ["a.txt", "b.txt"]])
def test_a_forged_end_of_text_names_the_files_of_the_slice(names: list[str], tmp_path: Path) -> None:
    files = [write(tmp_path / "in" / name, b"known known stranger") for name in names]
    tokenizer = {
        "kind": "file",
        "path": str(write(tmp_path / "tokenizer.json", _TOKENIZER.encode())),
        "end_of_text": "END",
    }
    made = config(tmp_path / "out", [one_source(tmp_path / "in" / "*.txt")], tokenizer=tokenizer)
    place = str(files[0]) if len(files) == 1 else rf"{files[0]} to {files[1]} \(2 files\)"
    with pytest.raises(DataError, match=f"^{place}: .*'known known stranger'.*'END'"):
        prepare(made)
    assert not list((tmp_path / "out").rglob("*.bin"))
