"""docs/reliability.md, from what `make reliability` found."""

from __future__ import annotations

import json
from pathlib import Path

from kronblocks_lab.pages import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "reliability.json"
INTRO = """# Reliability

<!-- written by kronblocks_lab.pages.reliability from benchmarks/results: do not edit -->

What was done to the library, and what happened.
`make reliability` tries all of it again, with the tests in tests/reliability.
Every run of `make test` tries each fault a few times.
[Words](words.md) explains block, mask, lift and the other terms.
"""


def pages() -> dict[Path, str]:
    """The whole page."""
    found = json.loads(RESULTS.read_text())
    rows = [f"| {row['fault']} | {row['tried']} | {row['happened']} |" for row in found["rows"]]
    versions = found["versions"]
    about = f"{versions['processor']}, Python {versions['python']}, torch {versions['torch']}, {found['seconds']:.0f} s."
    text = "\n".join([INTRO, about, "", "| fault | tried | what happened |", "| --- | --- | --- |", *rows]) + "\n"
    return {ROOT / "docs" / "reliability.md": text}
