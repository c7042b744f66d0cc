"""Pages that teach: links lead somewhere, pages say for whom they are, commands exist, generated tables are fresh."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from cluster.metrics import PREFIX, TABLE
from deploy.cli.main import app

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), ROOT / "k8s/README.md"]
STUB = "operations.md"  # only leads on
CUSTOM_RESOURCES = {"front", "expert"}  # of Ray, in the chart
CODE = re.compile(r"^ *```.*?^ *```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!\w+:)([^)\s]*)\)")
by_name = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", CODE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    broken = []
    for link in LINK.findall(CODE.sub("", page.read_text())):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


@by_name
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One\n[a](page.md#one) [b](page.md#two) [c](other.md) [d](https://example.com/e)\n")
    assert broken_links(page) == ["page.md#two", "other.md"]


@by_name
def test_a_page_says_first_for_whom_it_is(page: Path) -> None:
    if page.name != STUB:
        head = " ".join(page.read_text().split("\n## ")[0].split())
        assert re.search(r"\b(is|are) for\b", head), head


@by_name
def test_prose_has_lines_of_at_most_a_hundred_columns(page: Path) -> None:
    prose = re.sub(r"<!-- table: .*?<!-- end -->", "", CODE.sub("", page.read_text()), flags=re.DOTALL)
    assert [line for line in prose.splitlines() if len(line) > 100 and not line.lstrip().startswith(("|", "!["))] == []


@by_name
def test_metrics_that_a_page_names_exist(page: Path) -> None:
    named = set(re.findall(rf"(?:`|^){PREFIX}(\w+)", page.read_text(), re.MULTILINE))
    assert named <= {each.name for each in TABLE} | CUSTOM_RESOURCES


@by_name
def test_commands_that_a_page_shows_exist(page: Path) -> None:
    shown = re.findall(r"^\$ (?:\.venv/bin/)?(outcrop [a-z].*)$", page.read_text(), re.MULTILINE)
    assert [each for each in shown if wrong_flags(each)] == []


def wrong_flags(shown: str) -> list[str]:
    """What `outcrop COMMAND` of this command line lacks: the command itself, or flags."""
    words = shlex.split(shown.split("  #")[0].split(" | ")[0], comments=True)
    command = typer.main.get_command(app).commands.get(words[1])  # type: ignore[attr-defined]
    if command is None:
        return [words[1]]
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    return [word for word in words[2:] if word.startswith("--") and word not in known]


def test_a_wrong_command_is_found() -> None:
    assert wrong_flags("outcrop scale --replicas 2   # --nonsense") == []
    assert wrong_flags("outcrop scale --replica 2") == ["--replica"]
    assert wrong_flags("outcrop stop") == ["stop"]


def test_the_reference_is_what_its_script_writes() -> None:
    checked = subprocess.run([sys.executable, ROOT / "docs/tables.py", "--check"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
