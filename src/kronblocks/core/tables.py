"""Text tables in which like layers share a row: `layers.0-11.attention.{q,k,v,o}_proj (48 layers)`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

MOST_ROWS = 12
"""Up to this many layers have a row each; of more, those that are alike share one."""

ALL_ROWS = "layers that are alike share a row; .table(every_layer=True) gives each its own"
"""The remark below a table with shared rows."""

_FEW = 6
"""Most runs of numbers that a name lists before it writes dots."""

_T = TypeVar("_T")


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells in columns, the head first.

    >>> print(text_table([("layer", "live"), ("fc1", "12"), ("classifier", "")]))
    layer       live
    fc1         12
    classifier
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


class _Group(NamedTuple):
    key: Hashable
    numbers: tuple[tuple[str, ...], ...]  # the numbers in each layer's name
    parts: list[str]  # the parts of the first name, with stars for numbers


def together(
    layers: Iterable[_T], name: Callable[[_T], str], key: Callable[[_T], Hashable], *, siblings: bool = True
) -> list[list[_T]]:
    """Groups of layers whose keys are equal and whose names differ in numbers only, in the order of their first layers.

    Args:
        layers: any values that have names.
        name: gives a layer's name, with dots.
        key: gives what must be equal within a group.
        siblings: also join groups whose names differ in one more part, such as q_proj and k_proj, if their numbers are the same.

    >>> names = ["0.q_proj", "0.k_proj", "0.up", "1.q_proj", "1.k_proj", "head"]
    >>> together(names, str, lambda name: "up" in name)
    [['0.q_proj', '0.k_proj', '1.q_proj', '1.k_proj'], ['0.up'], ['head']]
    """
    found: dict[Hashable, list[_T]] = {}
    places: dict[int, int] = {}
    for index, each in enumerate(layers := list(layers)):
        found.setdefault((key(each), starred(name(each))), []).append(each)
        places[id(each)] = index
    groups = list(found.values())
    if siblings:
        groups = _with_siblings(groups, name, key)
    return [sorted(group, key=lambda each: places[id(each)]) for group in groups]


def rows_of(
    layers: Sequence[_T], name: Callable[[_T], str], key: Callable[[_T], Hashable], *, every_layer: bool
) -> tuple[list[list[_T]], list[str]]:
    """The layers of each row of a table, where many share rows as in `together`, and the remark below it if any do."""
    if every_layer or len(layers) <= MOST_ROWS:
        return [[layer] for layer in layers], []
    groups = together(layers, name, key)
    return groups, [ALL_ROWS] if len(groups) < len(layers) else []


def _with_siblings(groups: list[list[_T]], name: Callable[[_T], str], key: Callable[[_T], Hashable]) -> list[list[_T]]:
    joined: list[tuple[_Group, list[_T], set[int]]] = []
    for layers in groups:
        numbers = tuple(tuple(_NUMBER.findall(name(each))) for each in layers)
        new = _Group(key(layers[0]), numbers, starred(name(layers[0])).split("."))
        for group, members, place in joined:
            if group[:2] == new[:2] and len(group.parts) == len(new.parts):
                differ = {i for i, (one, other) in enumerate(zip(group.parts, new.parts, strict=True)) if one != other}
                if len(differ | place) == 1:
                    members += layers
                    place |= differ
                    break
        else:
            joined.append((new, list(layers), set()))
    return [members for _, members, _ in joined]


_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a part of a module's name


def starred(text: str) -> str:
    """A name with a star for each part that is a number.

    >>> starred("layers.11.conv2.0")
    'layers.*.conv2.*'
    """
    return _NUMBER.sub("*", text)


def span(names: Sequence[str]) -> str:
    """One text for the names of a group of layers, with how many there are.

    >>> span(["head"])
    'head'
    >>> span([f"layers.{i}.{each}_proj" for i in range(3) for each in "qk"])
    'layers.0-2.{q,k}_proj (6 layers)'
    """
    if len(names) == 1:
        return names[0]
    columns = list(zip(*(name.split(".") for name in names), strict=True))
    if math.prod(len(set(column)) for column in set(columns)) != len(names):  # not each of these with each of those
        return f"{some(names, 2)} ({len(names)} layers)"
    return f"{'.'.join(_part(list(dict.fromkeys(column))) for column in columns)} ({len(names)} layers)"


def _part(parts: list[str]) -> str:
    """One part of a group's name: the text, numbers or words that the names have there."""
    if len(parts) == 1:
        return parts[0]
    if all(part.isdecimal() and str(int(part)) == part for part in parts):
        return _ranges(sorted(map(int, parts)))
    words = [part.split("_") for part in parts]
    length, (head, tail) = min(map(len, words)), (_shared(words), _shared([each[::-1] for each in words]))
    if head + tail >= length:
        head = tail = 0
    inner = ",".join("_".join(each[head : len(each) - tail]) for each in words)
    return "_".join([*words[0][:head], f"{{{inner}}}", *words[0][len(words[0]) - tail :]])


def _shared(words: list[list[str]]) -> int:
    """How many words all lists begin with in common."""
    return next((i for i, column in enumerate(zip(*words, strict=False)) if len(set(column)) > 1), min(map(len, words)))


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers as a part of a name.

    >>> _ranges([0, 1, 2, 4, 6, 7]), _ranges(list(range(0, 40, 2)))
    ('0-2,4,6-7', '0,2,4,...,38')
    """
    starts = [number for number in numbers if number - 1 not in numbers]
    ends = [number for number in numbers if number + 1 not in numbers]
    runs = [str(start) if start == end else f"{start}-{end}" for start, end in zip(starts, ends, strict=True)]
    return ",".join(runs if len(runs) <= _FEW else [*runs[:3], "...", runs[-1]])


def listed(names: Sequence[str]) -> str:
    """Names with commas between them; like names are joined if there are many.

    >>> listed([f"encoder.{i}.fc1" for i in range(20)] + ["head"])
    'encoder.0-19.fc1 (20 layers), head'
    """
    groups = [[name] for name in names] if len(names) <= MOST_ROWS else together(names, str, lambda name: 0)
    return ", ".join(map(span, groups))


def some(names: Iterable[str], most: int = 5, *, join: str = ", ") -> str:
    """The first of several names, for a sentence.

    >>> some(["a", "b", "c"]), some(["a", "b", "c"], most=2)
    ('a, b, c', 'a, b, ...')
    """
    first = [*names]
    return join.join(first[:most]) + (f"{join}..." if len(first) > most else "")


_FIGURE = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def figureless(text: str) -> str:
    """A text with a star for each number, to compare texts that differ in numbers only."""
    return _FIGURE.sub("*", text)


def between(texts: Sequence[str]) -> str:
    """Join texts that differ in numbers only: each number becomes its range.

    >>> between(["0.31 ms of 2 rows", "0.28 ms of 2 rows", "0.3 ms of 2 rows"])
    '0.28 to 0.31 ms of 2 rows'
    """
    columns: Iterator[list[str]] = (sorted(set(each), key=float) for each in zip(*map(_FIGURE.findall, texts), strict=True))
    figures = iter([each[0] if len(each) == 1 else f"{each[0]} to {each[-1]}" for each in columns])
    return _FIGURE.sub(lambda _: next(figures), texts[0])
