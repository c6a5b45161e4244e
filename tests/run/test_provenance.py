"""A run stays with the image it was trained in unless its user allows another."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import UsageError
from pipeline.run.folder import Run
from pipeline.run.provenance import collect_provenance, current_image, refuse_other_image
from tests.test_bad_input import experiment, run_here


def start_in(monkeypatch: pytest.MonkeyPatch, sha256: str | None) -> dict:
    """The provenance of a start in an image with this checksum, or outside any image."""
    for name, value in (("PIPELINE_IMAGE", "/images/a.sif"), ("PIPELINE_IMAGE_SHA256", sha256)):
        monkeypatch.setenv(name, value) if sha256 else monkeypatch.delenv(name, raising=False)
    return collect_provenance()


def test_a_run_resumes_in_its_image_and_outside_any_image_but_not_in_another(monkeypatch: pytest.MonkeyPatch):
    starts = [start_in(monkeypatch, "a" * 64)]
    refuse_other_image(starts, current_image())
    starts.append(start_in(monkeypatch, None))
    assert starts[-1]["image"] is None
    refuse_other_image(starts, current_image())
    start_in(monkeypatch, "b" * 64)
    with pytest.raises(UsageError, match=f"{'a' * 64}.*{'b' * 64}.*`--allow-image-change`"):
        refuse_other_image(starts, current_image())


@pytest.mark.slow
def test_train_refuses_another_image_before_it_touches_the_run(tmp_path: Path, monkeypatch, capsys):
    config = experiment(tmp_path)
    assert run_here(monkeypatch, capsys, "prepare", config)[0] == 0
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    Run(run).add_provenance(start_in(monkeypatch, "a" * 64))
    start_in(monkeypatch, "b" * 64)
    status, err = run_here(monkeypatch, capsys, "train", config)
    assert status == 2 and err.count("error:") == 1 and "--allow-image-change" in err
    assert sorted(p.name for p in run.iterdir()) == ["provenance.json"]

    assert run_here(monkeypatch, capsys, "train", config, "--allow-image-change")[0] == 0
    recorded = [start["image"]["sha256"] for start in Run(run).provenance()]
    assert recorded == ["a" * 64, "b" * 64]
