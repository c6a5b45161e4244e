"""The user's own file that says where messages about jobs go; it is not part of a site or a config, which others share.

Jobs read it when they have something to tell, so that no address is copied into a run folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field

from pipeline.config.section_base import Section, rule
from pipeline.config.yaml_tree import Vocabulary
from pipeline.errors import ConfigError, Problem
from pipeline.run.private import refuse_shared

Occasion = Literal["finished", "failed", "gave_up", "spike"]

LOOPBACK = ("127.0.0.1", "::1", "localhost")
# Without quotes, commas or angle brackets: one address, which is no header of its own and no option.
_MAIL = r"^[^\s,;:<>()\"-][^\s,;:<>()\"]*$"


class Notify(Section):
    """Where messages about jobs go: every way that has a value is taken."""

    webhook: str | None = None
    """Address that takes a POST of `{"text": MESSAGE}`, as Slack, Mattermost and ntfy do; it counts as a secret."""
    mail: str | None = Field(default=None, pattern=_MAIL)
    """Mail address, given to the system's sendmail."""
    command: tuple[str, ...] = ()
    """Program and arguments, run without a shell; the message is its standard input."""
    on: tuple[Occasion, ...] = ("finished", "failed", "gave_up", "spike")
    """What is told."""

    @rule
    def _webhook_is_private(self) -> Iterator[Problem]:
        if self.webhook is not None and not _is_usable(self.webhook):
            yield Problem("webhook", "allowed: https://HOST/... without user name; http:// only for this machine")

    @rule
    def _names_a_way(self) -> Iterator[Problem]:
        if self.webhook is None and self.mail is None and not self.command:
            yield Problem("", "name at least one of webhook, mail and command")


NOTIFY = Vocabulary(Notify, "notify", "slurm/notify.yaml")


def settings_file() -> Path | None:
    """Returns the user's file; None where there is none, and nothing is told."""
    home = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    file = Path(home).expanduser() / "pipeline" / "notify.yaml"
    return file.absolute() if file.exists() else None


def load(file: Path) -> Notify:
    """Reads the file; no message of an error holds a value of it.

    Raises:
        UsageError: It cannot be read, or others can read it.
        ConfigError: Everything that is wrong with it.
    """
    refuse_shared(file, "the address of a webhook is a secret")
    text = NOTIFY.read(file)
    try:
        return NOTIFY.parse(text, str(file))
    except ConfigError as error:
        # Jobs print it into logs that others may read.
        told = [Problem(p.path, re.sub(r"^given .*, allowed: ", "allowed: ", p.message)) for p in error.problems]
        raise ConfigError(error.source, told, NOTIFY.kind) from None


def _is_usable(address: str) -> bool:
    try:
        parts = urlsplit(address)
        secure = parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in LOOPBACK)
        return secure and bool(parts.hostname) and "@" not in parts.netloc and bool(re.fullmatch(r"[!-~]+", address))
    except ValueError:
        return False
