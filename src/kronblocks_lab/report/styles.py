"""Colours, markers and dashes of methods (Okabe and Ito's colours, which the colour-blind can tell apart)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

COLOURS = {
    "dense": "#757a84",
    "two-phase": "#0072b2",
    "kron-l1": "#d55e00",
    "group-lasso": "#009e73",
    "magnitude": "#cc79a7",
    "static": "#e69f00",
    "elastic-group-lasso": "#44aa99",
    "rigl": "#882255",
    "iterative": "#332288",
}

OTHER_COLOUR = "#56b4e9"

MARKERS = {  # as SVG paths in a box of 14 by 14
    "o": "M7 3.5a3.5 3.5 0 1 0 .01 0z",
    "s": "M4 4h6v6H4z",
    "^": "M7 2.6 11 10H3z",
    "D": "M7 2.6 11.4 7 7 11.4 2.6 7z",
}

DASHES = ((), (5, 2), (1.5, 1.5), (6, 2, 1.5, 2))


class Style(NamedTuple):
    """How a row of the table looks in every figure."""

    colour: str
    marker: str
    dash: tuple[float, ...]


def styles(methods: Sequence[str]) -> list[Style]:
    """One style for each row of a table, by the rows' methods."""
    looks = list(zip(MARKERS, DASHES, strict=True))
    numbers = [methods[:place].count(method) % len(looks) for place, method in enumerate(methods)]
    return [Style(COLOURS.get(each, OTHER_COLOUR), *looks[number]) for each, number in zip(methods, numbers, strict=True)]
