"""Write the README's tables from benchmarks/results: `python benchmarks/tables.py`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from kronblocks.experiments.bench import page as speed
from kronblocks.experiments.reproduce import page as accuracy
from kronblocks.files import write_text

ROOT = Path(__file__).parent.parent


def fill(text: str, name: str, lines: Sequence[str]) -> str:
    """The page with a table put between its markers."""
    begin, end = f"<!-- begin table: {name} -->", f"<!-- end table: {name} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"there is no place for the table {name!r}: write {begin} and {end} where it belongs")
    return pattern.sub(lambda _: "\n".join([begin, *lines, end]), text)


def main() -> None:
    """All tables of README.md."""
    results, page = ROOT / "benchmarks/results", ROOT / "README.md"
    text = fill(page.read_text(), "accuracy", accuracy.summary(results))
    write_text(page, fill(text, "speed", speed.summary(results)))


if __name__ == "__main__":
    main()
