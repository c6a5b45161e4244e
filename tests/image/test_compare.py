"""A comparison of two images names every package and file that differs; a real pair is in tests/container."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.image.compare import compare, print_comparison
from pipeline.image.record import write_record
from tests.launch.container.support import sif

# What `find` and `sha256sum` print in each image, by its name.
LISTS = {"a.sif": "/etc d 755 \n/etc/one f 644 \n", "b.sif": "/etc d 755 \n/etc/one f 600 \n/etc/two l 777 one\n"}
SUMS = {"a.sif": "11  /etc/one\0", "b.sif": "22  /etc/one\0"}


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Two images whose files and one package differ."""

    def run_inside(image: Path, *command: str) -> str:
        return (SUMS if "sha256sum" in command else LISTS)[image.name]

    monkeypatch.setattr("pipeline.image.compare.run_inside", run_inside)
    made = (sif(tmp_path / "a.sif"), sif(tmp_path / "b.sif"))
    for image, version in zip(made, ("2.13.0", "2.14.0"), strict=True):
        write_record(image, {"python_packages": [f"torch=={version}"], "system_packages": ["libc6=2.36"]})
    return made


def test_every_difference_is_named(images: tuple[Path, Path]):
    first, second = images
    found = compare(first, second)
    assert found.packages == [f"torch==2.13.0: in {first} only", f"torch==2.14.0: in {second} only"]
    assert found.listed == [
        f"/etc/one f 600: in {second} only",
        f"/etc/one f 644: in {first} only",
        f"/etc/two l 777 one: in {second} only",
    ]
    assert (found.contents, found.files) == (["/etc/one"], 2)


def test_bytes_alone_make_no_difference_between_images(images: tuple[Path, Path], monkeypatch, capsys):
    first, second = images
    assert not print_comparison(first, second)
    write_record(second, {"python_packages": ["torch==2.13.0"], "system_packages": ["libc6=2.36"]})
    assert not print_comparison(first, second)
    monkeypatch.setitem(LISTS, "b.sif", LISTS["a.sif"])
    capsys.readouterr()
    assert print_comparison(first, second)
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[:3]] == [
        ["packages", "the"], ["files", "the"], ["contents", "1"],
    ]  # fmt: skip


def test_a_long_list_is_cut_and_counted(images: tuple[Path, Path], monkeypatch, capsys):
    monkeypatch.setitem(LISTS, "b.sif", "".join(f"/etc/{n:02} f 644 \n" for n in range(24)) + LISTS["a.sif"])
    assert not print_comparison(*images)
    out = capsys.readouterr().out
    assert "24 differ" in out and "/etc/19 f 644" in out and "/etc/20 f 644" not in out and "and 4 more" in out
