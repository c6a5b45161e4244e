"""How a store's failure is described to the user."""

import sqlite3
from types import SimpleNamespace

import pytest

from pipeline.tracking.upload.errors import in_words


class Refused(Exception):
    response = SimpleNamespace(status_code=401)


@pytest.fixture(autouse=True)
def ada(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ad")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "pw")


def test_a_short_user_name_is_masked_only_where_it_is_a_word():
    assert in_words(Exception("bad gateway (asked as 'ad', adieu)")) == "bad gateway (asked as '***', adieu)"


def test_every_part_of_a_password_is_masked():
    assert in_words(Exception("xpwx")) == "x***x"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("API request to http://h/get-by-name failed with exception HTTPConnectionPool(host='h', port=1): Max retries "
         f"exceeded with url: /{'x' * 400} (Caused by ResponseError('too many 500 error responses'))",
         "the server fails (500); see its log, then try again"),
        ("... (Caused by ResponseError('too many 429 error responses'))", "the server is asked too often (429); try"),
        ("API request to endpoint /get failed with error code 404 != 200. Response body: 'none'", "no MLflow server"),
        ("The response body was not in a valid JSON format. Response body: '<html>'", "a login page"),
        ("something " * 100, "something"),
    ],
)  # fmt: skip
def test_what_else_answers_is_said_with_its_cure(text: str, words: str):
    assert words in in_words(Exception(text)) and len(in_words(Exception(text))) <= 300


def test_the_reason_of_sqlite_is_told_and_not_the_advice_of_sqlalchemy():
    error = Exception("(raised as a result of Query-invoked autoflush; consider using a session.no_autoflush block)")
    error.__cause__ = sqlite3.OperationalError("database or disk is full")
    assert in_words(error) == "database or disk is full"
    error.__cause__ = PermissionError(13, "Permission denied", "/data/mlflow.db")
    assert in_words(error) == "/data/mlflow.db: Permission denied"


def test_credentials_in_mlflows_own_file_are_found_and_masked(monkeypatch, tmp_path):
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.delenv(name)
    assert "credentials (401): set MLFLOW_TRACKING_USERNAME" in in_words(Refused())
    (tmp_path / ".mlflow").mkdir()
    (tmp_path / ".mlflow" / "credentials").write_text(
        "[mlflow]\nmlflow_tracking_username = ada\nmlflow_tracking_password = 50%engine\n"
    )
    assert "credentials (401): check " in in_words(Refused())
    assert "~/.mlflow/credentials" in in_words(Refused())
    assert in_words(Exception("ada:50%engine")) == "***:***"


def test_a_damaged_file_of_credentials_hides_no_failure(tmp_path):
    (tmp_path / ".mlflow").mkdir()
    (tmp_path / ".mlflow" / "credentials").write_bytes(b"no section\xff")
    assert in_words(Exception("some failure")) == "some failure"
