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
    """When pruning happens, in shares of the whole training; `None` means the method's own default."""

    start: float = 0.05
    end: float | None = None  # 0.5; two-phase 0.4, kron-l1 0.8, rigl 0.75
    lift_at: float = 2 / 3  # share of the pruning span; two-phase only
    shape: Shape | None = None  # "cubic"; iterative "staircase"
    update_every: int = 50  # optimiser steps between mask updates
    stages: int = 5  # of the staircase shape

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
    """Strength of a penalty; `None` means 1 in the loss, and for the proximal form what the schedule wants."""

    strength: float | None = None
    growth: float = 3.0  # in the loss: how many times the strength at the end
    form: Form | None = None  # in the loss ("gradient"), or as a proximal step; None: kron-l1 "gradient", the others "proximal"
    ridge: float = 1.0  # elastic-group-lasso: strength of the squared norm, relative to that of the norm

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
    """Other settings for the layers that match a pattern; `None` leaves a setting as it is."""

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
