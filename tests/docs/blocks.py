"""The code blocks of README and docs, and what the pages say of each: where it is run, or why it is not."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")])
SCENARIOS = ("laptop", "cluster")
"""`<!-- run: laptop -->` before a block: test_laptop.py; `<!-- run: cluster -->`: tests/cluster/test_docs.py."""

_MARK = re.compile(r"<!-- (run|not run): (.+?) -->")
_PROGRAMS = (
    "adduser|apptainer|apt-get|bash|cat|cd|conda|cp|createdb|createuser|curl|eval|export|git|hf|install|make|mkdir|module|"
    "pg_ctlcluster|pip|pipeline|pytest|python|python3|rsync|runuser|sacct|sbatch|scontrol|scp|setpriv|sinfo|source|"
    r"squeue|srun|ssh|sudo|torchrun|install\.sh"
)
_COMMAND = re.compile(rf"(?:\S*/)?(?:{_PROGRAMS})(?=\s|$)|[A-Z_]+=\S* +\w")


@dataclass(frozen=True)
class Block:
    """One code block."""

    page: Path
    line: int
    """Number of its first line."""
    language: str
    """After the fence; empty for an indented block."""
    text: str
    """Its lines, without indentation."""
    marks: tuple[tuple[str, str], ...]
    """Of the comment before it: `run` or `not run`, and the scenario or the reason."""

    @property
    def is_shell(self) -> bool:
        """Whether a reader would type some line of it into a shell."""
        if self.language:
            return self.language in ("bash", "sh", "shell", "console")
        return any(_COMMAND.match(line) for line in self.text.splitlines())

    @property
    def commands(self) -> list[str]:
        """Its commands, without comments; a command over several lines is one."""
        joined = self.text.replace("\\\n", " ")
        return [line for line in joined.splitlines() if shlex.split(line, comments=True)]

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}: {self.text.splitlines()[0]}"


def blocks_of(page: Path) -> list[Block]:
    """Returns the code blocks of a page: fenced ones, and paragraphs that are indented by four spaces."""
    lines = page.read_text().splitlines()
    found, at, before = [], 0, ""
    while at < len(lines):
        line, language = lines[at], ""
        if line.startswith("```"):
            end = lines.index("```", at + 1)
            body = lines[at + 1 : end]
            end, language = end + 1, line.removeprefix("```")
        elif line.startswith("    ") and (at == 0 or not lines[at - 1].strip()):
            end = at
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            body = [inner[4:] for inner in lines[at:end]]
        else:
            before, at = line if line.strip() else before, at + 1
            continue
        marks = tuple(_MARK.findall(before)) if before.startswith("<!--") else ()
        found.append(Block(page, at + 1, language, "\n".join(body).rstrip(), marks))
        before, at = "", end
    return found


def shell_blocks(page: Path, scenario: str | None = None) -> list[Block]:
    """Returns the shell blocks of a page; with a scenario, those that are run in it."""
    found = [block for block in blocks_of(page) if block.is_shell]
    return found if scenario is None else [block for block in found if ("run", scenario) in block.marks]
