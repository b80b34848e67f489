"""Write the generated parts of README and docs, and their charts, from `benchmarks/results`: `python -m kronblocks_lab.pages`."""

from __future__ import annotations

from kronblocks.core.files import write_text
from kronblocks_lab.pages import front, limits, reliability, scale, tables

front.draw(front.FIGURES)
for module in (front, tables, limits, reliability, scale):
    for path, text in module.pages().items():
        write_text(path, text)
