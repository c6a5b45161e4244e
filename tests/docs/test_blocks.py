"""Every shell block of README and docs is run by a test, or says before it why it is not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.blocks import PAGES, ROOT, SCENARIOS, Block, blocks_of, shell_blocks


def problem(block: Block) -> str | None:
    if len(block.marks) != 1:
        return f"{block}: write <!-- run: {' or '.join(SCENARIOS)} --> or <!-- not run: REASON --> before it"
    ((kind, about),) = block.marks
    if kind == "run" and about not in SCENARIOS:
        return f"{block}: {about} is not one of {', '.join(SCENARIOS)}"
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_shell_block_is_run_or_says_why_not(page: Path):
    assert [said for said in map(problem, shell_blocks(page)) if said] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_mark_stands_before_anything_else(page: Path):
    marked = sum(len(block.marks) for block in shell_blocks(page))
    assert page.read_text().count("<!-- run:") + page.read_text().count("<!-- not run:") == marked


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/*.md")), ids=lambda page: page.name)
def test_a_page_begins_with_three_answers(page: Path):
    title, empty, *answers, after = page.read_text().splitlines()[:6]
    assert title.startswith("# ") and empty == after == ""
    assert [line for line in answers if not re.fullmatch(r"- \*\*How do I\*\* .+[.).`]", line)] == []


def test_every_page_is_in_the_site():
    pages = {page.name for page in ROOT.glob("docs/*.md")}
    assert set(re.findall(r"^ +- ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)) == pages


def test_blocks_are_found_with_their_marks(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A page\n\n    pipeline train a.yaml  # why\n    name: value\n\n    eval x\n\nText.\n\n"
        "<!-- run: laptop -->\n\n    pip install \\\n      this\n\n<!-- not run: why -->\n\n"
        "```bash\nanything\n```\n\n```yaml\npip: x\n```\n\n"
        "    pipeline: error: no\n\n    data:\n      make: 1\n"
    )
    found = [(block.line, block.is_shell, block.marks) for block in blocks_of(page)]
    assert found == [
        (3, True, ()), (12, True, (("run", "laptop"),)), (17, True, (("not run", "why"),)),
        (21, False, ()), (25, False, ()),
    ]  # fmt: skip
    assert blocks_of(page)[0].commands == ["pipeline train a.yaml  # why", "name: value", "eval x"]
    assert len(blocks_of(page)[1].commands) == 1
