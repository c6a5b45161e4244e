"""Classifies the failures of a store: whether a retry helps, and what to tell the user."""

from __future__ import annotations

import configparser
import contextlib
import os
import re
import socket
import sqlite3
from collections.abc import Iterator

from pipeline.errors import in_words as plain_in_words

_CREDENTIALS = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME")
_FILE = "~/.mlflow/credentials"  # where MLflow looks for what the environment lacks
_CURE = (
    f"MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, in the environment, or {_FILE}"
)
_ANSWERS = {
    "too many 429 error responses": "the server is asked too often (429); try again later",
    r"too many (\d+) error responses": "the server fails ({}); see its log, then try again",
    "error code 404|not in a valid JSON format": "what answers there is no MLflow server, or an old one, or a proxy or "
    "a login page in its place; check the address",
}
_STATUS = {"UNAUTHENTICATED": 401, "CUSTOMER_UNAUTHORIZED": 401, "PERMISSION_DENIED": 403}


def is_refusal(error: Exception) -> bool:
    """Returns whether a store understood a request and will always refuse it."""
    return getattr(error, "error_code", None) in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")


class RunDeleted(Exception):
    """The run was deleted in MLflow; opening it again restores it."""


def is_missing(error: Exception) -> bool:
    """Returns whether a store does not, or no longer, know what the request names."""
    return isinstance(error, RunDeleted) or getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST"


def in_words(error: Exception) -> str:
    """Describes a store's failure in one line, without credentials' values and with the cure where known."""
    text = (_redact(str(error)).strip() or type(error).__name__).splitlines()[0]
    status = _STATUS.get(getattr(error, "error_code", ""))
    if status is None:  # artifact requests raise errors of another kind
        status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401 and not _given():
        return f"the server asks for credentials (401): set {_CURE}"
    if status == 401:
        return f"the server does not accept these credentials (401): check {_CURE}"
    if status == 403:
        said = text.rpartition("Response body: ")[2][:300]
        return f"the server refuses access (403, {said}): check {_CURE}, and this user's rights"
    for cause in _causes(error):
        if isinstance(cause, (ConnectionError, socket.gaierror)):
            return f"cannot be reached ({cause.strerror or cause})"
        if isinstance(cause, TimeoutError):
            return "did not answer in time"
        if isinstance(cause, sqlite3.Error):  # SQLAlchemy's text begins with advice for its own users
            return str(cause)
        if isinstance(cause, OSError) and cause.strerror:
            return plain_in_words(cause)
    for pattern, words in _ANSWERS.items():
        found = re.search(pattern, text)
        if found is not None:
            return words.format(*found.groups())
    return text[:300]


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _given() -> dict[str, str]:
    """Returns the credentials that MLflow finds, by the name of their variables."""
    file = configparser.RawConfigParser()
    with contextlib.suppress(configparser.Error, ValueError):  # MLflow itself reports a damaged file
        file.read(os.path.expanduser(_FILE))  # noqa: PTH111  # without a home it stays unchanged
    found = {name: os.environ.get(name) or file.get("mlflow", name, fallback="") for name in _CREDENTIALS}
    return {name: value for name, value in found.items() if value}


def _redact(text: str) -> str:
    for name, secret in _given().items():
        # A user called `a` must not mask every a of the message, but no part of a password may remain.
        user = name == "MLFLOW_TRACKING_USERNAME"
        pattern = rf"(?<!\w){re.escape(secret)}(?!\w)" if user else re.escape(secret)
        text = re.sub(pattern, "***", text)
    return text
