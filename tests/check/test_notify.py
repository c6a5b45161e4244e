"""`pipeline check` finds out whether messages about jobs arrive."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.check.notify import check_notify
from pipeline.run.folder import Run
from tests.launch.notify.support import SECRET, webhook, write_settings

RUN = Run(Path("runs/tiny"))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_nothing_is_wrong_without_settings(home: Path):
    assert check_notify(RUN).status == "ok"


@pytest.mark.parametrize(("answer", "status"), [(200, "ok"), (404, "warning")])
def test_a_test_message_is_sent_and_an_address_that_refuses_it_is_a_warning(home: Path, answer: int, status: str):
    with webhook() as hook:
        hook.status = answer
        write_settings(home, webhook=hook.address)
        found = check_notify(RUN)
    assert found.status == status and len(hook.posted) == 1 and "tiny" in hook.texts[0]
    assert SECRET not in found.found + found.cure
    assert ("404" in found.found) == (answer == 404)


def test_settings_that_a_submission_would_refuse_are_a_failure(home: Path):
    write_settings(home, webhook=f"http://example.org/{SECRET}").chmod(0o600)
    found = check_notify(RUN)
    assert found.status == "failed" and SECRET not in found.found
