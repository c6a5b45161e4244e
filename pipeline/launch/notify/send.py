"""Sends one message by webhook, mail or command, all at once and within a time limit; it never raises."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from email.message import EmailMessage
from typing import Any
from urllib.parse import urlsplit

from pipeline.launch.notify.settings import LOOPBACK, Notify
from pipeline.text_format import printable

# Nobody waits longer for a dead server.
LIMIT_S = 5.0
_MOST_CHARACTERS = 2000
# Where Debian and others keep sendmail, which is on few users' PATH.
_SENDMAIL_PATH = "/usr/sbin:/usr/lib"


@dataclass(frozen=True)
class Message:
    """What is told, and about what."""

    about: Mapping[str, str]
    """Values for a command, by name: `event`, `run`, `job`."""
    subject: str
    """One line that says everything in short."""
    details: str = ""
    """Further lines."""

    @property
    def text(self) -> str:
        """The whole message, of bounded length and without control characters."""
        return printable("\n".join(filter(None, (self.subject, self.details))))[:_MOST_CHARACTERS]


def send(settings: Notify, message: Message, limit_s: float = LIMIT_S) -> list[str]:
    """Sends a message in every way that the settings name.

    Returns:
        One line per way that failed, without any address.
    """
    ways: dict[str, Callable[[], None]] = {}
    if settings.webhook is not None:
        ways["webhook"] = lambda: _post(str(settings.webhook), message, limit_s)
    if settings.mail is not None:
        ways["mail"] = lambda: _mail(str(settings.mail), message, limit_s)
    if settings.command:
        ways["command"] = lambda: _run(settings.command, message.text.encode(), limit_s, _variables(message))
    problems = dict.fromkeys(ways, f"no answer within {limit_s:.3g} s")

    def take(name: str) -> None:
        try:
            ways[name]()
        except Exception as error:  # urllib and the server's bytes raise anything
            problems[name] = _in_words(error)
        else:
            del problems[name]

    # A time limit of urllib holds for each of its steps, and not at all while it looks a name up.
    threads = [threading.Thread(target=take, args=(name,), daemon=True) for name in ways]
    end = time.monotonic() + limit_s + 0.5
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    return [f"{name}: {problem}" for name, problem in dict(problems).items()]


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: it could lead to a server without encryption."""

    def redirect_request(self, *_: Any) -> None:
        """Returns nothing, which makes the redirect an error."""


def _post(address: str, message: Message, limit_s: float) -> None:
    handlers: list[Any] = [_NoRedirects()]
    if urlsplit(address).hostname in LOOPBACK:
        handlers.append(urllib.request.ProxyHandler({}))
    headers = {"Content-Type": "application/json", "User-Agent": "pipeline"}
    body = json.dumps({"text": message.text}).encode()
    request = urllib.request.Request(address, body, headers, method="POST")
    with urllib.request.build_opener(*handlers).open(request, timeout=limit_s):
        pass


def _mail(address: str, message: Message, limit_s: float) -> None:
    program = shutil.which("sendmail", path=f"{os.environ.get('PATH', os.defpath)}:{_SENDMAIL_PATH}")
    if program is None:
        raise _FailedError("this machine has no sendmail")
    mail = EmailMessage()
    mail["To"] = address
    mail["Subject"] = " ".join(printable(message.subject)[:200].split())
    mail.set_content(message.text + "\n")
    _run([program, "-i", "-t"], mail.as_bytes(), limit_s, {})


def _run(command: Sequence[str], given: bytes, limit_s: float, variables: Mapping[str, str]) -> None:
    """Runs a program in a session of its own and kills what it started when the time is over."""
    # Whatever it prints would be in a log that others may read.
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, **variables}, start_new_session=True,
    )  # fmt: skip
    try:
        child.communicate(given, timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise _FailedError(f"no answer within {limit_s:.3g} s") from None
    finally:
        if child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    if child.returncode != 0:
        raise _FailedError(f"exit status {child.returncode}")


def _variables(message: Message) -> dict[str, str]:
    found = {f"PIPELINE_{name.upper()}": printable(value) for name, value in message.about.items()}
    return {**found, "PIPELINE_MESSAGE": message.text}


class _FailedError(Exception):
    """A program did not do what it was asked; the text says how."""


def _in_words(error: Exception) -> str:
    """Says what failed; the text of most exceptions may hold the address."""
    if isinstance(error, _FailedError):
        return str(error)
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answered {error.code}"
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, TimeoutError):
        return "no answer in time"
    return (isinstance(reason, OSError) and reason.strerror) or type(reason).__name__
