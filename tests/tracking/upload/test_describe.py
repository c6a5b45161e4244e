"""What a run says of the packages that it was trained with."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from pipeline.run.folder import Run
from pipeline.tracking.upload.describe import write_environment

SHADOWS = "Metadata-Version: 2.1{end}Name: it{end}Version: 1.2{end}{end}A README:{end}Name: other{end}Version: 9{end}"


def test_every_installed_package_is_listed(tmp_path: Path) -> None:
    run = Run(tmp_path)
    write_environment(run)
    expected = {f"{d.metadata['Name']}=={d.version}" for d in metadata.distributions() if d.metadata["Name"]}
    assert run.environment_file.read_text().splitlines() == sorted(expected)


def test_a_readme_names_no_package(tmp_path: Path, monkeypatch) -> None:
    found = []
    for number, end in enumerate(("\n", "\r\n")):
        folder = tmp_path / f"it{number}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_bytes(SHADOWS.format(end=end).encode())
        found.append(metadata.Distribution.at(folder))
    empty = tmp_path / "broken.dist-info"
    empty.mkdir()
    monkeypatch.setattr(metadata, "distributions", lambda: [*found, metadata.Distribution.at(empty)])
    write_environment(Run(tmp_path))
    assert Run(tmp_path).environment_file.read_text() == "it==1.2\n"
