"""What the failures of a store mean: whether trying again helps, and what a person is told."""

from __future__ import annotations

import configparser
import contextlib
import os
import re
import socket
from collections.abc import Iterator

_CREDENTIALS = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME")
_FILE = "~/.mlflow/credentials"  # where MLflow looks for what the environment leaves out
_CURE = (
    f"MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, in the environment, or {_FILE}"
)
_STATUS = {"UNAUTHENTICATED": 401, "CUSTOMER_UNAUTHORIZED": 401, "PERMISSION_DENIED": 403}


def is_refusal(error: Exception) -> bool:
    """Whether a store understood a request and will refuse it every time."""
    return getattr(error, "error_code", None) in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")


class RunDeleted(Exception):
    """Somebody deleted the run in MLflow; opening it again restores it."""


def is_missing(error: Exception) -> bool:
    """Whether a store does not know, or no longer, what it was asked about."""
    return isinstance(error, RunDeleted) or getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST"


def in_words(error: Exception) -> str:
    """A store's failure in one line, without the values of credentials, and what to change where that is known."""
    text = (_redact(str(error)).strip() or type(error).__name__).splitlines()[0][:300]
    status = _STATUS.get(getattr(error, "error_code", ""))
    if status is None:  # artifacts are sent by another way
        status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401 and not _given():
        return f"the server asks for credentials (401): set {_CURE}"
    if status == 401:
        return f"the server does not accept these credentials (401): check {_CURE}"
    if status == 403:
        said = text.rpartition("Response body: ")[2]
        return f"the server refuses access (403, {said}): check {_CURE}, and this user's rights"
    for cause in _causes(error):
        if isinstance(cause, (ConnectionError, socket.gaierror)):
            return f"cannot be reached ({cause.strerror or cause})"
        if isinstance(cause, TimeoutError):
            return "did not answer in time"
    return text


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _given() -> dict[str, str]:
    """The credentials that MLflow finds, by the name of the variable each would have."""
    file = configparser.RawConfigParser()
    with contextlib.suppress(configparser.Error, ValueError):  # MLflow's own failure tells of a damaged file
        file.read(os.path.expanduser(_FILE))  # noqa: PTH111  # without a home it stays as it is
    found = {name: os.environ.get(name) or file.get("mlflow", name, fallback="") for name in _CREDENTIALS}
    return {name: value for name, value in found.items() if value}


def _redact(text: str) -> str:
    for name, secret in _given().items():
        # A user called `a` must not take every a out of the message; of a password no piece may stay.
        user = name == "MLFLOW_TRACKING_USERNAME"
        pattern = rf"(?<!\w){re.escape(secret)}(?!\w)" if user else re.escape(secret)
        text = re.sub(pattern, "***", text)
    return text
