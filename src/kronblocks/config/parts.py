"""Parts of a `SparsityConfig`: the schedule, the penalty, and what differs for some layers."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Literal

from kronblocks.algorithms.budget import Scope
from kronblocks.algorithms.distribution import Distribution
from kronblocks.algorithms.rules.base import Form
from kronblocks.algorithms.schedule import Shape
from kronblocks.algorithms.targets import Score
from kronblocks.config.methods import Init, Method, Storage, TileGroups
from kronblocks.config.ranks import RankChoice
from kronblocks.core.blocks import BlockSize
from kronblocks.core.checks import number, one_of, whole
from kronblocks.core.errors import KronblocksError

BlockSizeLike = BlockSize | int | str | tuple[int, int]
Rank = int | RankChoice | None
Mismatch = Literal["dense", "nearest"]


@dataclass(frozen=True)
class ScheduleConfig:
    """When pruning happens. None means the method's default.

    Args:
        start: when pruning begins, as a share of the whole training.
        end: when it ends, and the mask is frozen. None: 0.5, but 0.4 for two-phase, 0.8 for kron-l1 and 0.75 for rigl.
        lift_at: when factors become free values, as a share of the time from start to end; two-phase only.
        shape: how sparsity rises: "cubic", "linear" or "staircase". None: cubic, but staircase for iterative.
        update_every: optimiser steps between mask updates.
        stages: number of stages of the staircase.
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


@dataclass(frozen=True)
class PenaltyConfig:
    """The penalty of kron-l1 and both lassos.

    Args:
        strength: None: 1 in the loss; in the proximal form, what the schedule needs.
        growth: factor by which the strength in the loss has grown at the end of pruning.
        form: "gradient" adds it to the loss, "proximal" shrinks blocks after each optimiser step. None: "gradient" for
            kron-l1, "proximal" for the lassos.
        ridge: strength of the squared norm, relative to that of the norm; elastic-group-lasso only.
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


@dataclass(frozen=True)
class MethodChoice:
    """Which method: the part of a `SparsityConfig` that commands for one training share.

    Args:
        method: "two-phase" (default) or "kron-l1" (the paper's) train factors. "group-lasso", "elastic-group-lasso",
            "magnitude" and "iterative" prune nn.Linear. "rigl" and "static" start sparse. "dense" changes nothing.
            `register_method` adds others.
    """

    method: Method = "two-phase"


@dataclass(frozen=True)
class BlockSettings:
    """Which blocks layers have: the part of a `SparsityConfig` that all commands share.

    Args:
        block_size: rows and columns, 16 or "16x4", in Python also (16, 4); "auto" for `kronblocks train`, which then searches.
        rank: number of Kronecker terms, for methods with factors. None: a quarter of a block's weights, from 2 to 8. For a
            trained model `RankChoice(...)` chooses one per layer by the weights.
        tile_groups: number of tile banks per layer, or "per-row". None: "per-row" for two-phase, 1 for kron-l1, as in the paper.
        on_mismatch: what to do where the block size does not divide a layer, or tile groups its block rows: leave the layer
            "dense", or use the "nearest" that divides.
    """

    block_size: BlockSizeLike = 16
    rank: Rank = None
    _: KW_ONLY
    tile_groups: TileGroups | None = None
    on_mismatch: Mismatch = "dense"

    def __post_init__(self) -> None:
        if self.block_size != "auto":
            BlockSize.parse(self.block_size)
        check_factors(self.rank, self.tile_groups)
        one_of("on_mismatch", self.on_mismatch, Mismatch)


@dataclass(frozen=True, kw_only=True)
class MethodSettings:
    """How a method works: the part of a `SparsityConfig` that commands for trainings share. None: the method's default.

    Args:
        gate: whether each block has a trained gate, the paper's S. Default: True for kron-l1 only.
        init: how factors start: "random" (orthonormal tiles, the variance of the layer's weights), "spectral" (nearest to the
            weights, rescaled to their variance) or "nearest" (nearest to the weights, for trained models). Which blocks of
            rigl and static live: "random" (default), or "nearest", those of greatest norm in each layer.
        score: how blocks are compared: "norm" (relative to their layer), "relative" (also to their block row and column), "gate"
            (|S|) or "taylor" (gradient times weight). Default: "relative" for two-phase, "norm" for others;
            kron-l1 compares gates.
        regrow: share of the live blocks that is exchanged, at the first mask update, for the dead ones of greatest gradient. It
            falls to 0 along a cosine. Default: 0.3 for rigl, 0 for others.
        scope: "global": one budget over all layers, of which each keeps a quarter of the mean density (except with score
            "taylor"). "layer": the same sparsity in each layer.
        distribution: how many live blocks each layer of rigl and static gets: "erk" (Erdos-Renyi: small layers are denser;
            default) or "uniform".
        storage: "packed": live blocks only, so that sparse training costs less (default of rigl and static). "dense": the
            nn.Linear itself (default of magnitude and iterative, which start with all blocks live).
        schedule: when pruning happens.
        penalty: for the methods that have one.
        measure_plans: choose plans by timings of this machine, taken once per shape and cached. False: by counted costs, which
            are the same on every machine.
    """

    gate: bool | None = None
    init: Init | None = None
    score: Score | None = None
    regrow: float | None = None
    scope: Scope = "global"
    distribution: Distribution | None = None
    storage: Storage | None = None
    schedule: ScheduleConfig = ScheduleConfig()
    penalty: PenaltyConfig = PenaltyConfig()
    measure_plans: bool = True

    def __post_init__(self) -> None:
        for name, kind in (("schedule", ScheduleConfig), ("penalty", PenaltyConfig)):
            if not isinstance(getattr(self, name), kind):
                raise KronblocksError(f"{name} is a {kind.__name__}(...), not {getattr(self, name)!r}")
        one_of("scope", self.scope, Scope)
        for name, allowed in (("init", Init), ("score", Score), ("distribution", Distribution), ("storage", Storage)):
            if getattr(self, name) is not None:
                one_of(name, getattr(self, name), allowed)
        if self.gate is not None and not isinstance(self.gate, bool):
            raise KronblocksError(f"gate is True, False or None, not {self.gate!r}")
        if self.regrow is not None:
            number("regrow", self.regrow, 0, 1, "a share of the live blocks, from 0 to below 1")
        if not isinstance(self.measure_plans, bool):
            raise KronblocksError(f"measure_plans is True or False, not {self.measure_plans!r}")


@dataclass(frozen=True)
class LayerOverride:
    """Other settings for the layers that match a pattern: `SparsityConfig(overrides={"head.*": LayerOverride(block_size=4)})`.

    Args:
        block_size: for these layers; None: the config's.
        rank: for these layers; None: the config's.
        tile_groups: for these layers; None: the config's.
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


def check_factors(rank: Rank, tile_groups: TileGroups | None) -> None:
    if rank is not None and not isinstance(rank, RankChoice):
        whole("rank", rank, "the number of Kronecker terms")
    if tile_groups is not None and tile_groups != "per-row":
        whole("tile_groups", tile_groups, '"per-row", or the number of tile banks')
