"""What the pages show exists: links, commands and their options, config keys, modules and files."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import click
import pytest
import typer

from pipeline.cli.main import app
from pipeline.config.sections import Config
from pipeline.config.yaml_tree import known_fields
from pipeline.run import events

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


@functools.cache
def commands() -> dict[str, click.Command]:
    """Every command by the words that call it: `train`, `image build` ..."""
    found = {}
    for name, command in typer.main.get_command(app).commands.items():
        found[name] = command
        found |= {f"{name} {inner}": made for inner, made in getattr(command, "commands", {}).items()}
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_to_files_of_the_project(page: Path):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []


def shown_commands(page: Path) -> list[str]:
    """Every line that begins with `pipeline` in a code block or between backticks, without its comment."""
    code = re.findall(r"^ {4,}(.*)$", page.read_text(), re.M) + re.findall(r"`([^`]+)`", page.read_text())
    return [line.partition("  #")[0] for line in code if re.match(r"\s*(?:\S*/)?pipeline [a-z]", line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_that_a_page_shows_exist(page: Path):
    shown = {re.search(r"pipeline ([a-z][a-z-]*)", line)[1] for line in shown_commands(page)}
    assert shown <= set(commands())


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_options_that_a_page_shows_are_options_of_their_command(page: Path):
    unknown = []
    for line in shown_commands(page):
        words = re.search(r"pipeline ([a-z][a-z-]*)(?: ([a-z][a-z-]*))?", line)
        command = commands().get(f"{words[1]} {words[2]}") or commands()[words[1]]
        known = {option for parameter in command.params for option in parameter.opts}
        unknown += [(line, option) for option in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", line) if option not in known]
    assert unknown == []


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "CHANGELOG.md"], ids=lambda p: p.name)
def test_files_and_modules_that_a_page_names_exist(page: Path):
    text = page.read_text()
    rooms = "pipeline|tests|benchmarks|slurm|configs|containers"
    paths = set(re.findall(rf"(?<![\w-])(?<!~/\.config/)(?:{rooms})/[\w./-]*\w", text))
    modules = re.findall(r"-m ((?:pipeline|benchmarks)\.[\w.]+)|`(pipeline\.\w+\.[\w.]+)", text)
    paths |= {"".join(found).replace(".", "/") for found in modules}
    assert [path for path in paths if not exists(ROOT / path)] == []


def exists(path: Path) -> bool:
    """Whether this is a file, a folder, a module, or a name in a module."""
    return path.exists() or path.with_suffix(".py").exists() or path.parent.with_suffix(".py").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_overrides_that_a_page_shows_are_keys_of_the_config(page: Path):
    lines = [line for line in page.read_text().splitlines() if re.search(r"pipeline [a-z]+ +\S+\.yaml", line)]
    overrides = {m for line in lines for m in re.findall(r"(?<!-)\b([a-z_]+(?:\.[a-z_]+)+)=", line)}
    assert overrides <= {path for path, _ in known_fields(Config)}


def test_the_page_of_the_run_folder_lists_every_kind_of_event():
    table = (ROOT / "docs/run-folder.md").read_text().partition("## Events")[2].partition("## ")[0]
    first_cells = re.findall(r"^\| (`[^|]+) \|", table, re.M)
    kinds = {e.kind for e in vars(events).values() if isinstance(e, type) and issubclass(e, events.Event)} - {""}
    assert {kind for cell in first_cells for kind in re.findall(r"`(\w+)`", cell)} == kinds
