"""Sizes of a model as they are written on a command line, such as `width=384,depth=6`, to be tried within the same time."""

from __future__ import annotations

from typing import Any

from kronblocks.core.errors import KronblocksError

NAMES = ("widths", "width", "depth", "heads")
"""Settings that a size may have."""


def size_of(text: str) -> dict[str, Any]:
    """The settings of a size.

    Raises:
        KronblocksError: it cannot be read.

    >>> size_of("width=384,depth=6"), size_of("widths=512-256")
    ({'width': 384, 'depth': 6}, {'widths': (512, 256)})
    """
    found: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        try:
            numbers = tuple(int(number) for number in value.split("-"))
        except ValueError:
            numbers = ()
        if name not in NAMES or name in found or min(numbers, default=0) < 1 or (name != "widths" and len(numbers) > 1):
            raise KronblocksError(
                f"cannot read {text!r} of --try-sizes: write settings from {', '.join(NAMES)} and their values, such as "
                "width=384,depth=6 or widths=512-256"
            )
        found[name] = numbers if name == "widths" else int(value)
    return found


def folder_of(text: str) -> str:
    """A size as a part of a folder's name.

    >>> folder_of("width=384,depth=6")
    'width384-depth6'
    """
    return text.replace("=", "").replace(",", "-")
