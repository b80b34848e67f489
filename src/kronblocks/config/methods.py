"""The methods: one entry each, with what it stores, its rule, its settings and its defaults."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from kronblocks.algorithms.budget import Distribution
from kronblocks.algorithms.rules.base import Form, Rule, Strength, check_rule
from kronblocks.algorithms.rules.fixed import Fixed
from kronblocks.algorithms.rules.group_lasso import GroupLasso
from kronblocks.algorithms.rules.kron_l1 import KronL1
from kronblocks.algorithms.rules.magnitude import Magnitude
from kronblocks.algorithms.rules.rigl import Rigl
from kronblocks.algorithms.schedule import Shape
from kronblocks.algorithms.targets import Score
from kronblocks.config.ranks import RankChoice
from kronblocks.core.checks import one_of
from kronblocks.core.errors import KronblocksError

Init = Literal["random", "spectral", "nearest"]
TileGroups = int | Literal["per-row"]
Storage = Literal["dense", "packed"]
Kept = Literal["factors", "dense", "packed"]
Setting = Literal[
    "rank",
    "tile_groups",
    "gate",
    "init",
    "score",
    "regrow",
    "scope",
    "distribution",
    "storage",
    "penalty",
    "penalty.ridge",
    "schedule.shape",
    "schedule.lift_at",
]
"""Settings of a `SparsityConfig` that only some methods have."""


@dataclass(frozen=True)
class Choices:
    """What `None` stands for: the defaults of a method, and of a config (`config.resolved()`) what the user chose over them.

    Args:
        storage: of the weights at first: "factors", live blocks only ("packed"), or the nn.Linear itself ("dense").
        end: of pruning, as a share of the training.
        shape: of the sparsity over time.
        rank: number of Kronecker terms; "by-area": `own_rank` of the area of each layer's blocks.
        tile_groups: "per-row", or the number of tile banks.
        gate: whether blocks have trained gates.
        init: how factors or live blocks start.
        score: what blocks are compared by; a method that has no such setting leaves it to its rule.
        regrow: share of the live blocks that is exchanged at the first mask update.
        distribution: of the blocks that live at first over the layers, where the method is sparse from the start.
        form: of the penalty.
        strength: of the penalty; "scheduled": a proximal step goes by what the schedule wants, and in the loss it is 1.
        growth: how many times its strength a penalty in the loss has at the end.
        ridge: strength of the squared norm relative to that of the norm.
    """

    storage: Kept = "dense"
    end: float = 0.5
    shape: Shape = "cubic"
    rank: int | RankChoice | Literal["by-area"] = "by-area"
    tile_groups: TileGroups = "per-row"
    gate: bool = False
    init: Init = "random"
    score: Score = "norm"
    regrow: float = 0.0
    distribution: Distribution = "erk"
    form: Form = "proximal"
    strength: Strength = "scheduled"
    growth: float = 3.0
    ridge: float = 1.0


@dataclass(frozen=True)
class MethodSpec:
    """What a method is; `METHODS` has one for each.

    Args:
        rule: makes the algorithm from a config's choices; None: the method makes nothing sparse.
        settings: those that the method has, of the ones that only some methods have; setting another one is an error.
        defaults: what counts where the user sets nothing.
        revision: raise it when a change alters what trainings come to; experiments run again what is of an earlier one.

    A method whose storage is "factors" replaces nn.Linear by Kronecker layers. One with the setting "distribution" has the target
    sparsity from the first step, one with "schedule.lift_at" lifts factors to free values, and one with "storage" works on the
    nn.Linear itself or on live blocks only.
    """

    rule: Callable[[Choices], Rule] | None
    settings: frozenset[Setting] = frozenset()
    defaults: Choices = Choices()
    revision: int = 1

    @property
    def is_factored(self) -> bool:
        """Whether it begins with Kronecker factors."""
        return self.defaults.storage == "factors"

    @property
    def is_lifted(self) -> bool:
        """Whether it lifts factors to free values."""
        return "schedule.lift_at" in self.settings

    @property
    def starts_sparse(self) -> bool:
        """Whether it has the target sparsity from the first step."""
        return "distribution" in self.settings

    @property
    def draws_start(self) -> bool:
        """Whether it begins with factors or blocks that `init` chooses, not with all weights that are there."""
        return "init" in self.settings


def _of(*settings: Setting) -> frozenset[Setting]:
    return frozenset(settings)


def _prune(choices: Choices) -> Rule:
    return Magnitude(choices.score, choices.regrow)


_FACTORS = _of("rank", "tile_groups", "gate", "init")
_PRUNING = _of("score", "regrow", "scope")

METHODS: dict[str, MethodSpec] = {
    "two-phase": MethodSpec(
        _prune, _FACTORS | _PRUNING | _of("schedule.shape", "schedule.lift_at"), Choices(storage="factors", end=0.4), revision=2
    ),
    "kron-l1": MethodSpec(
        lambda choices: KronL1(choices.form, choices.strength, choices.growth),
        _FACTORS | _of("scope", "penalty", "schedule.shape"),
        Choices(storage="factors", end=0.8, form="gradient", tile_groups=1, init="spectral", gate=True),
        revision=2,
    ),
    "group-lasso": MethodSpec(
        lambda choices: GroupLasso(choices.form, choices.strength, choices.growth),
        _of("scope", "penalty", "schedule.shape"),
        revision=4,
    ),
    "elastic-group-lasso": MethodSpec(
        lambda choices: GroupLasso(choices.form, choices.strength, choices.growth, ridge=choices.ridge),
        _of("scope", "penalty", "penalty.ridge", "schedule.shape"),
        revision=4,
    ),
    "rigl": MethodSpec(
        lambda choices: Rigl(choices.regrow),
        _of("init", "regrow", "distribution", "storage"),
        Choices(storage="packed", end=0.75, regrow=0.3),
        revision=3,
    ),
    "iterative": MethodSpec(_prune, _PRUNING | _of("storage"), Choices(shape="staircase"), revision=2),
    "magnitude": MethodSpec(_prune, _PRUNING | _of("storage", "schedule.shape"), revision=2),
    "static": MethodSpec(lambda _: Fixed(), _of("init", "distribution", "storage"), Choices(storage="packed"), revision=2),
    "dense": MethodSpec(None, _of("schedule.shape")),
}
"""Every method by its name."""

if TYPE_CHECKING:
    Method = str  # users may register others
else:
    Method = Literal[tuple(METHODS)]  # what command lines offer


def spec_of(method: str) -> MethodSpec:
    """What a method is.

    Raises:
        KronblocksError: there is none of this name.
    """
    one_of("method", method, METHODS)
    return METHODS[method]


def register_method(name: str, spec: MethodSpec) -> None:
    """Make a method of your own known by a name, so that `SparsityConfig(method=name)` and files of configs can say it.

    A single training needs no name: give `sparsify_` the rule.

    Args:
        name: that no method has yet.
        spec: what it is.

    Raises:
        KronblocksError: the name is taken, or it is no MethodSpec that a training could use.

    >>> from kronblocks.algorithms.rules.magnitude import Magnitude
    >>> register_method("prune-by-loss", MethodSpec(lambda choices: Magnitude("taylor"), frozenset({"scope"})))
    >>> METHODS.pop("prune-by-loss").is_factored
    False
    """
    if not isinstance(spec, MethodSpec):
        raise KronblocksError(f"a method is a MethodSpec(rule, settings, defaults), not {spec!r}")
    if not isinstance(name, str) or name in METHODS:
        raise KronblocksError(f"{name!r} is a method already, or no name: use another one than {', '.join(METHODS)}")
    if unknown := sorted(set(spec.settings) - set(get_args(Setting))):
        raise KronblocksError(f"a method has no setting {unknown[0]!r}: there are {', '.join(get_args(Setting))}")
    one_of("Choices.storage", spec.defaults.storage, Kept)
    needs_factors = {"rank", "tile_groups", "gate", "schedule.lift_at"} & spec.settings
    if needs_factors and not spec.is_factored:
        raise KronblocksError(f"the setting {min(needs_factors)!r} is for factors: write defaults=Choices(storage='factors')")
    if not (spec.rule is None or callable(spec.rule)):
        raise KronblocksError(f"a MethodSpec makes its rule from a config's choices: write lambda choices: {spec.rule!r}")
    if spec.rule is not None:
        check_rule(spec.rule if isinstance(spec.rule, type) else spec.rule(spec.defaults))
    METHODS[name] = spec


COMMON_RANK = 4
"""Kronecker terms of candidates that are trained together, where the user sets none: they are to differ in their blocks only."""


def own_rank(area: int) -> int:
    """Kronecker terms for blocks of this many weights, where the user sets none: a quarter of them, from 2 to 8.

    Measured (docs/experiments.md): at 16x16 trials choose 8 rather than 4. At 4x4 they do too, by 0.1 to 1.1 points of validation
    accuracy in one or two seeds; with all else as by default five seeds are level, and 8 has twice the factors.

    >>> own_rank(4), own_rank(16), own_rank(256)
    (2, 4, 8)
    """
    return min(area, max(2, min(8, area // 4)))
