"""Tables of Markdown pages that a script writes.

A page marks such a table by `<!-- table: NAME -->` and `<!-- end -->`; what stands between is the script's.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(?<=<!-- table: )([\w-]+)( -->\n).*?(?=<!-- end -->)", re.DOTALL)

Table = Callable[[], str]


def fill(text: str, tables: Mapping[str, Table]) -> str:
    """The page with every marked table written anew. Raises KeyError for a mark that no table has."""
    return BLOCK.sub(lambda found: f"{found[1]}{found[2]}{tables[found[1]]()}", text)


def main(page: Path, tables: Mapping[str, Table], arguments: list[str]) -> int:
    """Write the page, or with --check only say whether it is as it would be written. Returns the exit code."""
    before = page.read_text()
    after = fill(before, tables)
    if arguments != ["--check"]:
        page.write_text(after)
    elif before != after:
        print(f"{page.relative_to(ROOT)} is stale: run the script that fills it without --check")
        return 1
    return 0


def table(head: Iterable[str], rows: Iterable[Iterable[str]], others: str = "---:") -> str:
    """As Markdown. The first column is text, and so are the others where they are `---`."""
    head = list(head)
    lines = [head, ["---", *[others] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
