"""Parts of a `SparsityConfig`: the schedule, the penalty, and what differs for some layers."""

from __future__ import annotations

from dataclasses import dataclass

from kronblocks.blocks import BlockSize
from kronblocks.checks import number, one_of, whole
from kronblocks.errors import KronblocksError
from kronblocks.methods import TileGroups
from kronblocks.ranks import RankChoice
from kronblocks.sparsity.rules.base import Form
from kronblocks.sparsity.schedule import Shape

BlockSizeLike = BlockSize | int | str | tuple[int, int]


@dataclass(frozen=True)
class ScheduleConfig:
    """When pruning happens; `None` means the method's own default.

    Args:
        start: of pruning, as a share of the whole training.
        end: of pruning; None: 0.5, of two-phase 0.4, of kron-l1 0.8, of rigl 0.75. The mask stays as it is from then on.
        lift_at: when factors become free values, as a share of the time from start to end; two-phase only.
        shape: of the sparsity over time, "cubic", "linear" or "staircase"; None: cubic, of iterative staircase.
        update_every: optimiser steps between mask updates.
        stages: of the staircase.
    """

    start: float = 0.05
    end: float | None = None
    lift_at: float = 2 / 3
    shape: Shape | None = None
    update_every: int = 50
    stages: int = 5

    def __post_init__(self) -> None:
        if self.shape is not None:
            one_of("schedule.shape", self.shape, Shape)
        number("schedule.start", self.start, 0, 1, "the share of the training before pruning, from 0 to below 1")
        if self.end is not None:
            number("schedule.end", self.end, 0, 1 + 1e-12, "the share of the training at which pruning ends, up to 1")
            if self.end <= self.start:
                raise KronblocksError(f"schedule.end={self.end} must be above schedule.start={self.start}")
        number("schedule.lift_at", self.lift_at, 0, 1 + 1e-12, "a share of the pruning span, from 0 to 1")
        whole("schedule.update_every", self.update_every, "the optimiser steps between mask updates")
        whole("schedule.stages", self.stages, "the number of stages of the staircase")
        if self.shape not in ("staircase", None) and self.stages != ScheduleConfig.stages:
            raise KronblocksError(f"schedule.stages={self.stages} is for shape='staircase', and the shape is {self.shape!r}")


@dataclass(frozen=True)
class PenaltyConfig:
    """The penalty of kron-l1 and both lassos.

    Args:
        strength: None: 1 in the loss, and for the proximal form what the schedule wants.
        growth: in the loss: how many times the strength at the end of pruning.
        form: in the loss ("gradient"), or as a step after the optimiser's ("proximal"); None: of kron-l1 gradient, of the lassos
            proximal.
        ridge: of elastic-group-lasso: strength of the squared norm, relative to that of the norm.
    """

    strength: float | None = None
    growth: float = 3.0
    form: Form | None = None
    ridge: float = 1.0

    def __post_init__(self) -> None:
        if self.form is not None:
            one_of("penalty.form", self.form, Form)
        if self.strength is not None:
            number("penalty.strength", self.strength, 0, float("inf"), "a number from 0 on, or None")
        number("penalty.growth", self.growth, 0, float("inf"), "a number from 0 on")
        number("penalty.ridge", self.ridge, 0, float("inf"), "a number from 0 on")
        if self.form == "proximal" and self.growth != PenaltyConfig.growth:
            raise KronblocksError(f"penalty.growth={self.growth} is for form='gradient': a proximal penalty does not grow")


@dataclass(frozen=True)
class LayerOverride:
    """Other settings for the layers that match a pattern: `SparsityConfig(overrides={"head.*": LayerOverride(block_size=4)})`.

    Args:
        block_size: of these layers; None: as it is for all.
        rank: the same.
        tile_groups: the same.
    """

    block_size: BlockSizeLike | None = None
    rank: int | None = None
    tile_groups: TileGroups | None = None

    def __post_init__(self) -> None:
        if self.block_size is not None:
            object.__setattr__(self, "block_size", BlockSize.parse(self.block_size))
        if isinstance(self.rank, RankChoice):
            raise KronblocksError(
                "a RankChoice is for all layers: write SparsityConfig(rank=RankChoice(...)), and numbers in overrides"
            )
        check_factors(self.rank, self.tile_groups)


def check_factors(rank: int | RankChoice | None, tile_groups: TileGroups | None) -> None:
    if rank is not None and not isinstance(rank, RankChoice):
        whole("rank", rank, "the number of Kronecker terms")
    if tile_groups is not None and tile_groups != "per-row":
        whole("tile_groups", tile_groups, '"per-row", or the number of tile banks')
