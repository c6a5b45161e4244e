"""The record of an image: its checksum notices every change, and a record that lacks something is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import PipelineError
from pipeline.files import sha256_file
from pipeline.image.record import digest, read_record, record_file, write_record
from tests.launch.container.support import sandbox, sif


@pytest.mark.parametrize(
    "change",
    [
        lambda image: (image / "file").write_text("other"),
        lambda image: (image / "file").chmod(0o755),
        lambda image: (image / "more").touch(),
        lambda image: ((image / "link").unlink(), (image / "link").symlink_to("more")),
    ],
    ids=["content", "mode", "name", "link"],
)
def test_the_digest_of_a_sandbox_changes_with_every_file(tmp_path: Path, change: Callable[[Path], object]):
    image = sandbox(tmp_path / "image")
    before = digest(image)
    assert digest(image) == before
    change(image)
    assert digest(image) != before


def test_a_record_holds_checksum_and_size(tmp_path: Path):
    image = sif(tmp_path / "img.sif", content=b"0" * 1_450_000)
    write_record(image, {"commit": "abc"})
    assert record_file(image) == tmp_path / "img.sif.json"
    assert read_record(image, ["commit"]) == {"commit": "abc", "size_mb": 1.5, "sha256": sha256_file(image)}
    box = sandbox(tmp_path / "box")
    (box / "file").write_bytes(b"0" * 2_000_000)
    write_record(box, {})
    assert read_record(box)["size_mb"] == 2.0


@pytest.mark.parametrize("content", ["[]", '{"commit": "abc"}', '{"sha256": 1}'])
def test_a_file_that_is_no_record_is_named(tmp_path: Path, content: str):
    (tmp_path / "img.sif.json").write_text(content)
    with pytest.raises(PipelineError, match=f"{tmp_path}/img.sif.json: not the record"):
        read_record(tmp_path / "img.sif")


@pytest.mark.parametrize(("record", "lacks"), [({}, "base.name, commit"), ({"base": "bookworm"}, "base.name, commit")])
def test_the_keys_that_a_record_lacks_are_named(tmp_path: Path, record: dict, lacks: str):
    (tmp_path / "img.sif.json").write_text(json.dumps({"sha256": "x", **record}))
    with pytest.raises(PipelineError, match=f"{tmp_path}/img.sif.json: .* lacks {lacks};"):
        read_record(tmp_path / "img.sif", ["base.name", "commit"])
