"""Documentation matches the project: links resolve, and the commands and config keys it shows exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from pipeline.cli.main import app
from pipeline.config.sections import Config
from pipeline.config.yaml_tree import known_paths

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def commands() -> set[str]:
    """Every command as a user types it: `train`, `image build` ..."""
    found = set()
    for name, command in typer.main.get_command(app).commands.items():
        found.add(name)
        found |= {f"{name} {inner}" for inner in getattr(command, "commands", {})}
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_to_files_of_the_project(page: Path):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_that_a_page_shows_exist(page: Path):
    code = re.findall(r"^ {4,}(.*)$", page.read_text(), re.M) + re.findall(r"`(pipeline [^`]+)`", page.read_text())
    shown = {m[1] for line in code for m in [re.match(r"(?:\S*/)?pipeline ([a-z][a-z-]*)", line.strip())] if m}
    assert shown <= commands()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_overrides_that_a_page_shows_are_keys_of_the_config(page: Path):
    lines = [line for line in page.read_text().splitlines() if re.search(r"pipeline [a-z]+ +\S+\.yaml", line)]
    overrides = {m for line in lines for m in re.findall(r"(?<!-)\b([a-z_]+(?:\.[a-z_]+)+)=", line)}
    assert overrides <= set(known_paths(Config))
