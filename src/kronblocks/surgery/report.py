"""SurgeryReport: which layers become sparse, which stay dense and why, and their shares of the model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from kronblocks.core.blocks import BlockGrid
from kronblocks.core.tables import MOST_ROWS, some, span, starred, together

_EACH = 3
"""From this many on, layers whose names differ in a number only share a line."""


@dataclass(frozen=True)
class Selected:
    """A layer that becomes sparse."""

    name: str
    grid: BlockGrid
    rank: int
    tile_groups: int
    note: str = ""  # for example, that the block size is not the one asked for
    error: float | None = None  # |W - start| / |W| if the layer starts from an existing weight W; None: it starts from new values

    def __str__(self) -> str:
        return f"{self.name}: {self._words([self])}"

    def _words(self, alike: list[Selected]) -> str:
        """The text for layers that are alike except for their errors."""
        words = [self.note] if self.note else []
        errors = [each.error for each in alike if each.error is not None]
        if errors:
            least, most = f"{min(errors):.3f}", f"{max(errors):.3f}"
            words.append(f"start within {most if least == most else f'{least} to {most}'} of the weight, relatively")
        return str(self.grid) + (f" ({'; '.join(words)})" if words else "")


@dataclass(frozen=True)
class LeftDense:
    """A layer, or another module with weights, that stays dense, and why."""

    name: str
    reason: str
    share: float = 0.0  # its share of the model's weights; tied ones count for each owner
    by_choice: bool = False  # whether the user chose so, by layers, exclude or frozen; also for embeddings and adapters


@dataclass(frozen=True)
class SurgeryReport:
    """What `sparsify_` replaced or targeted, and what it left dense. Print it for a table.

    Like layers share a line: `print(sparsifier.surgery.table(every_layer=True))` has one for each.

    Args:
        selected: layers that become sparse.
        left_dense: linear layers that do not, and other modules with weights of two or more dimensions.
        weights: number of weights in the model, with biases, each counted once.
        missed: number of weights that stay dense without the user having chosen so by `layers`, `exclude` or `frozen`. It
            excludes embeddings, what is tied to them, and vectors such as biases.
    """

    selected: tuple[Selected, ...]
    left_dense: tuple[LeftDense, ...]
    weights: int = 0
    missed: int = 0

    @property
    def targeted(self) -> int:
        """Number of weights in layers that become sparse."""
        return sum(each.grid.weights for each in self.selected)

    def most_missed(self) -> str:
        """The largest modules among the `missed`, in words."""
        missed = [each for each in self.left_dense if not each.by_choice]
        shares = [(sum(each.share for each in alike), _names(alike)) for alike in _by_number(missed, _reason)]
        most = [f"{name}: {100 * share:.0f}%" for share, name in sorted(shares, key=lambda pair: -pair[0]) if share >= 0.01]
        return some(most, 3)

    def table(self, *, every_layer: bool = False) -> str:
        """What `print` shows; with `every_layer`, with a line for each layer."""
        selected, left = [[each] for each in self.selected], [[each] for each in self.left_dense]
        if not every_layer:
            selected, left = _by_number(self.selected, _kind), _by_number(self.left_dense, _reason)
            if len(selected) + len(left) > MOST_ROWS:
                selected = together(self.selected, _name, _kind)
                left = together(self.left_dense, _name, _reason)
        lines = [f"sparse: {_names(alike)}: {alike[0]._words(alike)}" for alike in selected]
        lines += [f"dense:  {_names(alike)}: {alike[0].reason}{_of_all(sum(each.share for each in alike))}" for alike in left]
        if self.weights:
            lines.append(f"{100 * self.targeted / self.weights:.1f}% of the model's {self.weights:,} weights are targeted")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


def _of_all(share: float) -> str:
    return f" ({100 * share:.1f}% of the weights)" if share >= 0.0005 else ""


_Listed = TypeVar("_Listed", Selected, LeftDense)


def _name(each: Selected | LeftDense) -> str:
    return each.name


def _kind(each: Selected) -> Hashable:
    return each.grid, each.note


def _reason(each: LeftDense) -> Hashable:
    return starred(each.reason)


def _names(alike: list[Selected] | list[LeftDense]) -> str:
    return span([each.name for each in alike])


def _by_number(layers: Iterable[_Listed], key: Callable[[_Listed], Hashable]) -> list[list[_Listed]]:
    """Group layers whose names differ in numbers only, if there are many."""
    groups = together(layers, _name, key, siblings=False)
    return [part for group in groups for part in ([group] if len(group) >= _EACH else [[each] for each in group])]
