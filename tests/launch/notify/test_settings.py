"""The user's file: only its owner can read it, and no message about it holds the address."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import UsageError
from pipeline.launch.notify.settings import NOTIFY, Notify, load, settings_file
from tests.launch.notify.support import SECRET, write_settings
from tests.launch.support import ROOT, SITE, FakeSlurm, submit, write_files


def test_a_file_that_others_can_read_is_refused(tmp_path: Path):
    file = write_settings(tmp_path, webhook=f"https://example.org/{SECRET}")
    assert load(file).webhook == f"https://example.org/{SECRET}"
    for mode in (0o640, 0o604, 0o620):
        file.chmod(mode)
        with pytest.raises(UsageError, match="chmod 600"):
            load(file)


@pytest.mark.parametrize(
    "webhook",
    [
        f"http://example.org/{SECRET}", f"https://me:{SECRET}@example.org/", f"ftp://example.org/{SECRET}", SECRET,
        f"https://exa mple.org/{SECRET}", f"https://[::1/{SECRET}", [f"https://{SECRET}"], {"to": SECRET},
        f"https://example.org/\x00{SECRET}", f"https:///{SECRET}",
    ],
)  # fmt: skip
def test_an_address_that_would_give_the_secret_away_is_refused_and_not_repeated(tmp_path: Path, webhook: object):
    with pytest.raises(UsageError) as refused:
        load(write_settings(tmp_path, webhook=webhook))
    assert "webhook" in str(refused.value) and SECRET not in str(refused.value)


@pytest.mark.parametrize(
    "values",
    [{}, {"on": ["finished"]}, {"mail": "-oQ/tmp"}, {"mail": "a@b, c@d"}, {"mail": "a@b", "on": ["always"]},
     {"command": "rm -r"}, {"webhok": f"https://example.org/{SECRET}"}],
)  # fmt: skip
def test_settings_that_name_no_usable_way_are_refused(tmp_path: Path, values: dict[str, object]):
    with pytest.raises(UsageError) as refused:
        load(write_settings(tmp_path, **values))
    assert SECRET not in str(refused.value)


def test_the_file_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "here"))
    assert settings_file() is None
    file = write_settings(tmp_path / "here", mail="ada")
    assert settings_file() == file
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    file = write_settings(tmp_path / ".config", mail="ada")
    assert settings_file() == file


def test_the_example_names_every_key_and_works_once_a_way_is_filled_in():
    text = (ROOT / "slurm" / "notify.yaml").read_text()
    assert all(f"\n{key}: " in text for key in Notify.model_fields)
    filled = NOTIFY.parse(text.replace("mail: null", "mail: ada@example.org"), "example")
    assert filled == Notify(mail="ada@example.org")


def test_a_submission_keeps_the_file_s_place_and_no_secret(
    tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    file = write_settings(tmp_path / "home", webhook=f"https://example.org/{SECRET}")
    write_files(tmp_path, site=SITE)
    file.chmod(0o644)
    refused = submit(tmp_path, slurm)
    assert (refused.status, slurm.calls("sbatch")) == (2, []) and "notify.yaml" in refused.err
    file.chmod(0o600)
    assert submit(tmp_path, slurm).status == 0
    published = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert any(str(file) in path.read_text(errors="replace") for path in published)
    assert [path for path in published if SECRET in path.read_text(errors="replace")] == []
