"""Which addresses name a store, and which hold a secret that must not be repeated."""

import pytest

from pipeline.errors import UsageError
from pipeline.tracking.upload.store import resolve_uri
from pipeline.tracking.upload.sync import sync
from tests.tracking.support import make_run


@pytest.mark.parametrize("uri", ["mlruns", "file:///tmp/x", "sqlite:///", "postgresql://u:p@h/db", "http://"])
def test_addresses_that_name_no_store_are_refused(uri):
    with pytest.raises(UsageError):
        resolve_uri(uri)


@pytest.mark.parametrize(
    ("uri", "cure"),
    [
        ("https://ada:secretpw@host", "MLFLOW_TRACKING_PASSWORD"),
        ("ada:secretpw@host:5000", "MLFLOW_TRACKING_PASSWORD"),
        ("//secretpw@host", "MLFLOW_TRACKING_PASSWORD"),
        ("https://ada:secretpw@[bad", "MLFLOW_TRACKING_PASSWORD"),
        ("http://ada:secretpw", r"http\(s\)://HOST:PORT"),
        ("https://[secretpw", r"http\(s\)://HOST:PORT"),
        ("http://127.0.0.1:9/?token=secretpw", "MLFLOW_TRACKING_TOKEN"),
        ("http://127.0.0.1:9/#secretpw", "MLFLOW_TRACKING_TOKEN"),
        ("sqlite:///mlflow.db?key=secretpw", "sqlite:///FILE"),
    ],
)
def test_a_password_in_the_address_is_refused_without_being_repeated(tmp_path, uri, cure):
    run, _ = make_run(tmp_path, "none")
    for try_it in (lambda: make_run(tmp_path, uri), lambda: sync(run, uri), lambda: resolve_uri(uri)):
        with pytest.raises(UsageError, match=cure) as refused:
            try_it()
        assert "secretpw" not in str(refused.value)
    assert not any(b"secretpw" in f.read_bytes() for f in tmp_path.rglob("*") if f.is_file())


@pytest.mark.parametrize("uri", ["http://[::1]:5000", "https://host/mlflow", "sqlite:////home/ada@host/c#/mlflow.db"])
def test_addresses_without_a_secret_are_accepted(uri):
    assert resolve_uri(uri) == uri
