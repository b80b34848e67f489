"""Parts of a `SparsityConfig`: the schedule, the penalty, and what differs for some layers."""

from __future__ import annotations

from dataclasses import dataclass

from kronblocks.algorithms.budget import Distribution, Scope
from kronblocks.algorithms.rules.base import Form
from kronblocks.algorithms.schedule import Shape
from kronblocks.algorithms.targets import Score
from kronblocks.config.methods import Init, Storage, TileGroups
from kronblocks.config.ranks import RankChoice
from kronblocks.core.blocks import BlockSize
from kronblocks.core.checks import number, one_of, whole
from kronblocks.core.errors import KronblocksError

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


@dataclass(frozen=True, kw_only=True)
class MethodSettings:
    """How a method goes about it: the part of a `SparsityConfig` that the laboratory's command lines have too.

    Args:
        gate: a trained gate for each block, the paper's S; None: the method's own, True for kron-l1.
        init: of factors "random" (orthonormal tiles, the variance of the layer's weights), "spectral" (nearest to these weights,
            with their variance) or "nearest" (nearest to the present weights: for trained models); None: the method's
            own. Of rigl's and static's live blocks "random" (the default) or "nearest": those of greatest norm in each layer.
        score: what blocks are compared by: "norm" (their norm, whatever the scale of their layer), "gate" (|S|) or "taylor"
            (gradient times weight); None: the method's own, "gate" for kron-l1.
        regrow: share of the live blocks that is exchanged, at the first mask update, for the dead ones of greatest gradient; it
            falls to 0 by a cosine. None: the method's own, 0.3 for rigl and 0 for the others that can.
        scope: one budget over all layers ("global"), of which each keeps a quarter of the mean density unless blocks are scored
            by "taylor", or the same sparsity in each ("layer").
        distribution: of rigl's and static's live blocks over the layers: "erk" (Erdos-Renyi: small layers denser; the default) or
            "uniform".
        storage: live blocks only ("packed", the default of rigl and static: their cost is real), or the nn.Linear ("dense", the
            default of magnitude and iterative, which start with all blocks live).
        schedule: when pruning happens.
        penalty: for the methods that have one.
        measure_plans: choose plans by timings of this machine, taken once for each shape and kept in the cache folder; False: by
            counted costs alone, the same on every machine.
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
