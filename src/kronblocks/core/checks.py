"""Checks of settings: each raises one error that says what may be written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from kronblocks.core.errors import KronblocksError


def one_of(name: str, value: object, allowed: object) -> None:
    """Raise unless the value is one of a `Literal`, or a key of a mapping."""
    names = tuple(allowed) if isinstance(allowed, Mapping) else get_args(allowed)
    if value not in names:
        raise KronblocksError(f"{name}={value!r} is unknown: write one of {', '.join(map(repr, names))}")


def number(name: str, value: object, low: float, high: float, what: str) -> None:
    """Raise unless the value is a number, low <= value < high."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value < high:
        raise KronblocksError(f"{name} is {what}, not {value!r}")


def whole(name: str, value: object, what: str) -> None:
    """Raise unless the value is a whole number from 1 on."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise KronblocksError(f"{name} is {what}, a whole number from 1 on, not {value!r}")
