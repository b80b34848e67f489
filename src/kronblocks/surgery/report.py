"""What `select` found: the layers that become sparse, those that stay dense and why, and how much of the model either is."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from kronblocks.core.blocks import BlockGrid

_EACH = 3
"""Layers that differ in a number of their name only, from which on they share a line."""

_FEW = 6
"""Numbers with gaps that are written out."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Selected:
    """A layer that becomes sparse."""

    name: str
    grid: BlockGrid
    rank: int
    tile_groups: int
    note: str = ""  # where the block size is not the one asked for
    error: float | None = None  # |W - start| / |W| where the layer starts from a weight W that was there; None: it starts anew

    def __str__(self) -> str:
        return f"{self.name}: {self._words([self])}"

    def _words(self, alike: list[Selected]) -> str:
        """What is to be said of layers that are alike but for their errors."""
        words = [self.note] if self.note else []
        errors = [each.error for each in alike if each.error is not None]
        if errors:
            least, most = f"{min(errors):.3f}", f"{max(errors):.3f}"
            words.append(f"start within {most if least == most else f'{least} to {most}'} of the weight, relatively")
        return str(self.grid) + (f" ({'; '.join(words)})" if words else "")


@dataclass(frozen=True)
class LeftDense:
    """A layer, or another module with weights of its own, that stays dense, and why."""

    name: str
    reason: str
    share: float = 0.0  # of the model's weights that it holds; tied ones count for each of their owners
    by_choice: bool = False  # of the user, by layers, exclude or frozen; embeddings and adapters are never wanted sparse


@dataclass(frozen=True)
class SurgeryReport:
    """What `sparsify_` replaced or targeted, and what it left dense. Print it for a table: layers that are alike share a line.

    Args:
        selected: layers that become sparse.
        left_dense: linear layers that do not, and other modules that hold weights of two or more dimensions.
        weights: parameters of the model, biases and all, each counted once.
        missed: those of them that are not targeted, although nobody chose so: not what `layers`, `exclude` or `frozen` leave
            out, no embeddings nor what is tied to them, and no vectors such as biases and norms.
    """

    selected: tuple[Selected, ...]
    left_dense: tuple[LeftDense, ...]
    weights: int = 0
    missed: int = 0

    @property
    def targeted(self) -> int:
        """Weights of the layers that become sparse."""
        return sum(each.grid.weights for each in self.selected)

    def most_missed(self) -> str:
        """What stays dense without anybody having chosen so and holds most weights, in words."""
        missed = [each for each in self.left_dense if not each.by_choice]
        shares = [(sum(each.share for each in alike), _names(alike)) for alike in _by_name(missed)]
        most = [f"{name}: {100 * share:.0f}%" for share, name in sorted(shares, key=lambda pair: -pair[0]) if share >= 0.01]
        return ", ".join(most[:3]) + (", ..." if len(most) > 3 else "")

    def __str__(self) -> str:
        lines = [
            f"sparse: {_names(alike)}: {alike[0]._words(alike)}"
            for alike in _alike(self.selected, lambda each: (_pattern(each.name), each.grid, each.note))
        ]
        lines += [
            f"dense:  {_names(alike)}: {alike[0].reason}{_of_all(sum(each.share for each in alike))}"
            for alike in _by_name(self.left_dense)
        ]
        if self.weights:
            lines.append(f"{100 * self.targeted / self.weights:.1f}% of the model's {self.weights:,} weights are targeted")
        return "\n".join(lines)


def _of_all(share: float) -> str:
    return f" ({100 * share:.1f}% of the weights)" if share >= 0.0005 else ""


_NUMBER = re.compile(r"(?:(?<=^)|(?<=\.))\d+(?=\.|$)")  # a part of a module's name


def _pattern(text: str) -> str:
    """A text with a star for each number that is a part of a name."""
    return _NUMBER.sub("*", text)


def _alike(found: Iterable[_T], key: Callable[[_T], Hashable]) -> list[list[_T]]:
    """Entries of one key together where there are many, in the order of each one's first."""
    groups: dict[Hashable, list[_T]] = {}
    for each in found:
        groups.setdefault(key(each), []).append(each)
    return [part for group in groups.values() for part in ([group] if len(group) >= _EACH else [[each] for each in group])]


def _by_name(left: Iterable[LeftDense]) -> list[list[LeftDense]]:
    return _alike(left, lambda each: (_pattern(each.name), _pattern(each.reason)))


def _names(alike: list[Selected] | list[LeftDense]) -> str:
    """The name of one entry, or what many names have in common, such as "layers.0-11.fc1 (12 layers)"."""
    names = [each.name for each in alike]
    if len(names) < _EACH:
        return names[0]
    columns = (sorted({int(number) for number in column}) for column in zip(*map(_NUMBER.findall, names), strict=True))
    numbers = iter([_range(column) for column in columns])
    return f"{_NUMBER.sub(lambda _: next(numbers), names[0])} ({len(names)} layers)"


def _range(numbers: list[int]) -> str:
    """Ascending numbers as a part of a name."""
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
    return ",".join(map(str, numbers)) if len(numbers) <= _FEW else "*"
