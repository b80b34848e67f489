"""Which layers `kronblocks bench ops` and `infer` measure: their options and the groups that follow from them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from kronblocks.core.blocks import BlockGrid, BlockSize
from kronblocks.core.errors import KronblocksError
from kronblocks_lab.bench.settings import TimedSettings

SHAPES = ("1024x1024", "4096x1024", "1024x4096", "768x3072", "192x768")
BLOCKS = ("4", "8", "16", "32", "64", "16x4", "8x32")
DENSITIES = (0.05, 0.1, 0.25, 0.5, 1.0)
ROWS = (1, 16, 256, 2048)
LARGE_ROWS, LARGE_SHAPES, LARGE_BLOCKS, LARGE_DENSITIES = 20_000, ("1024x1024", "192x768"), ("8", "16", "64"), (0.1, 1.0)

# of --large: the layers of large models, which want a GPU
GPU_SHAPES, GPU_BLOCKS, GPU_ROWS, GPU_RANKS = ("4096x4096", "4096x16384"), ("16", "32", "64", "128"), (256, 20_000), (1, 4, 8)

INFER_BLOCKS, INFER_DENSITIES = ("4", "16", "64", "16x4"), (0.05, 0.1, 0.25, 0.5)
LARGE_WEIGHT = ("4096x4096", ("16",), (0.1,), (1, 16))  # what a weight that is in no cache costs


class Group(NamedTuple):
    """What is timed together: every way of computing one layer, with one input."""

    shape: tuple[int, int]  # (out_features, in_features)
    block: BlockSize
    density: float
    rows: int
    second_pass: bool = False  # pyfastkron, which brings threads of its own into the process, comes after all others

    @property
    def grid(self) -> BlockGrid:
        """The layer's grid of blocks."""
        return BlockGrid(*self.shape, self.block)

    @property
    def key(self) -> dict[str, Any]:
        """As the columns of a row."""
        shape = f"{self.shape[0]}x{self.shape[1]}"
        return {"shape": shape, "block": str(self.block), "density": self.density, "rows": self.rows}

    def __str__(self) -> str:
        return f"{self.shape[0]}x{self.shape[1]}, {self.block} blocks, density {self.density:g}, {self.rows:,} rows"


def parse_shape(text: str) -> tuple[int, int]:
    """Read "4096x1024", (out_features, in_features)."""
    found = re.fullmatch(r"(\d{1,9})x(\d{1,9})", text)
    if not found:
        raise KronblocksError(f"--shapes are written out_features x in_features, such as 4096x1024, not {text!r}")
    return int(found[1]), int(found[2])


@dataclass(frozen=True, kw_only=True)
class GridSettings(TimedSettings):
    """A grid of layers; what is unset takes the benchmark's own values."""

    shapes: tuple[str, ...] | None = None
    """Weights, out_features x in_features: 4096x1024 ..."""
    blocks: tuple[str, ...] | None = None
    """Block sizes: 16 16x4 ..."""
    densities: tuple[float, ...] | None = None
    """Shares of live blocks: 0.1 1 ..."""
    rows: tuple[int, ...] | None = None
    """Rows of the input: 1 256 ..."""
    choices: bool = False
    """Measure nothing, but choose again what "auto" means in each finished group."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for density in self.densities or ():
            if not 0 < density <= 1:
                raise KronblocksError(f"--densities are shares of live blocks, above 0 and up to 1, not {density}")
        for rows in self.rows or ():
            if rows < 1:
                raise KronblocksError(f"--rows are at least 1, not {rows}")
        if any(given == () for given in (self.shapes, self.blocks, self.densities, self.rows)):
            raise KronblocksError("an option of the grid without a value leaves nothing to measure: give one, or leave it out")
        self.groups()

    def _full(self) -> list[Group]:
        raise NotImplementedError

    def _product(self, shapes: Any, rows: Any, blocks: Any, densities: Any, second_pass: bool = False) -> list[Group]:
        """All combinations; inputs change least often, since they are made once for each shape and number of rows."""
        return [
            Group(parse_shape(shape), BlockSize.parse(block), density, count, second_pass)
            for shape in shapes
            for count in rows
            for block in blocks
            for density in densities
        ]

    def groups(self) -> list[Group]:
        """What to measure, in order.

        Raises:
            KronblocksError: a shape or block size that cannot be read, or that do not fit together.
        """
        groups = self._full()
        for group in groups:
            _ = group.grid
        return groups

    @property
    def _is_whole(self) -> bool:
        return not self.quick and (self.shapes, self.blocks, self.densities, self.rows) == (None,) * 4


@dataclass(frozen=True, kw_only=True)
class OpsSettings(GridSettings):
    """Time forward and forward + backward of one layer, in every plan, against dense and other libraries."""

    ranks: tuple[int, ...] | None = None
    """Kronecker terms of the factored layers; unset: 1 4, and with --large 1 4 8."""
    large: bool = False
    """Layers of large models: 4096x4096 and 4096x16384, blocks of 16 to 128, 256 and 20,000 rows."""

    kind = "ops"

    def __post_init__(self) -> None:
        if self.ranks is not None and min(self.ranks, default=0) < 1:
            raise KronblocksError(f"--ranks are whole numbers from 1 on, at least one of them, not {self.ranks}")
        super().__post_init__()

    @property
    def name(self) -> str:
        """Of the file, without its ending."""
        return super().name.replace(self.kind, f"{self.kind}-large", 1) if self.large else super().name

    @property
    def all_ranks(self) -> tuple[int, ...]:
        """Kronecker terms of the factored layers."""
        return self.ranks if self.ranks is not None else (GPU_RANKS if self.large else (1, 4))

    def shared(self) -> dict[str, Any]:
        """What all rows of a file have in common."""
        return {**super().shared(), "ranks": list(self.all_ranks)}

    def _full(self) -> list[Group]:
        quick, large = self.quick, self.large
        shapes = self.shapes or (GPU_SHAPES if large else SHAPES)[: 1 if quick else None]
        rows = self.rows or ((256,) if quick else GPU_ROWS if large else ROWS)
        blocks = self.blocks or (("16",) if quick else GPU_BLOCKS if large else BLOCKS)
        densities = self.densities or ((0.1, 1.0) if quick else DENSITIES)
        groups = self._product(shapes, rows, blocks, densities)
        if self._is_whole and not large:
            groups += self._product(LARGE_SHAPES, (LARGE_ROWS,), LARGE_BLOCKS, LARGE_DENSITIES)
        if 1 in self.all_ranks and 1.0 in densities and not large:
            groups += self._product(shapes, rows, blocks, (1.0,), True)
        return groups


@dataclass(frozen=True, kw_only=True)
class InferSettings(GridSettings):
    """Time one layer in inference: what a finished model would run."""

    rank: int = 4
    """Kronecker terms of the factored layer."""

    kind = "infer"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise KronblocksError(f"--rank is a whole number from 1 on, not {self.rank}")
        super().__post_init__()

    def shared(self) -> dict[str, Any]:
        """What all rows of a file have in common."""
        return {**super().shared(), "rank": self.rank}

    def _full(self) -> list[Group]:
        quick = self.quick
        groups = self._product(
            self.shapes or (SHAPES[:1] if quick else SHAPES),
            self.rows or ((1, 256) if quick else ROWS),
            self.blocks or (("16",) if quick else INFER_BLOCKS),
            self.densities or ((0.1,) if quick else INFER_DENSITIES),
        )
        if self._is_whole:
            shape, blocks, densities, rows = LARGE_WEIGHT
            groups += self._product((shape,), rows, blocks, densities)
        return groups
