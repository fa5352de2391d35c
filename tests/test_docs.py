"""README says what is there: every plug-in, every command, links that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from secure_export.cli import main
from secure_export.policy import parse_policy
from secure_export.registry import FAMILIES, names

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("family", FAMILIES)
def test_readme_names_every_plugin(family: str) -> None:
    row = next((line for line in README.splitlines() if line.startswith(f"| {family} |")), "")
    assert sorted(re.findall(r"`([\w-]+)`", row)) == names(family)


@pytest.mark.parametrize("command", sorted(main.commands))
def test_every_command_is_documented(command: str) -> None:
    assert re.search(rf"secure-export {command}\b", README)


def test_readmes_policy_can_be_used() -> None:
    lines = README.split("## A policy")[1].split("\n## ")[0].splitlines()
    policy = "\n".join(line[4:] for line in lines if line.startswith("    "))
    assert parse_policy(policy, "README").expanded_settings()


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").glob("*.md")), ids=str)
def test_no_placeholder_is_left(path: Path) -> None:
    assert not re.search(r"<!--\s*(demo|measured)\s*-->|TODO|TBD", path.read_text())


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").glob("*.md")), ids=str)
def test_every_link_leads_to_a_heading_that_is_there(path: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([^)\s]+))?\)", path.read_text()):
        page = path.parent / target if target else path
        assert page.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{target}#{anchor}"
