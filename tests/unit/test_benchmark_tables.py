"""Every figure of docs/benchmarks.md stands in a file of benchmarks/results, and the page shows it as it is there."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.markdown import BLOCK, fill, main
from benchmarks.tables import PAGE, RESULTS, TABLES

TEXT = PAGE.read_text()
FIGURE = re.compile(r"\d ?(?:%|ms|us|s|KiB|MiB|GiB|GB/s|GFLOP/s|tokens/s|tok/s)(?![\w-])|\d\.\d")


def without_tables(text: str) -> str:
    return BLOCK.sub("", text)


def test_the_page_is_what_the_script_writes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(PAGE, TABLES, ["--check"]) == 0, capsys.readouterr().out


def test_every_table_is_on_the_page() -> None:
    assert set(re.findall(r"<!-- table: ([\w-]+) -->", TEXT)) == set(TABLES)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_a_result_says_when_and_how_it_was_measured_and_is_shown(path: Path) -> None:
    environment = json.loads(path.read_text())["environment"]
    assert re.match(r"20\d\d-\d\d-\d\d", environment["date"])
    assert environment["command"] or path.stem == "peers-amx"
    assert f"`results/{path.name}`" in TEXT


def test_no_figure_stands_in_prose() -> None:
    assert not FIGURE.findall(without_tables(TEXT))


def test_a_figure_in_prose_is_found() -> None:
    for told in ("it takes 12 ms", "0.9 of local", "about 20 % more", "reads 18 GB/s"):
        assert FIGURE.search(told)


def test_a_changed_figure_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text(TEXT.replace("| 27.1 |", "| 72.1 |"))
    assert page.read_text() != TEXT
    monkeypatch.setattr("benchmarks.markdown.ROOT", tmp_path)
    assert main(page, TABLES, ["--check"]) == 1
    main(page, TABLES, [])
    assert page.read_text() == TEXT


def test_a_mark_without_a_table_is_refused() -> None:
    with pytest.raises(KeyError, match="nobody"):
        fill("<!-- table: nobody -->\n<!-- end -->\n", TABLES)
