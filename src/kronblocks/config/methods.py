"""The methods: one entry each, with what it stores, its rule, its settings and its defaults."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from kronblocks.algorithms.distribution import Distribution
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
"""The settings of a `SparsityConfig` that only some methods have."""


@dataclass(frozen=True)
class Choices:
    """Values for every setting that may be None: a method's defaults, or what a config comes to (`config.resolved()`).

    Args:
        storage: what a layer stores at first: "factors", "packed" (live blocks only) or "dense" (the nn.Linear itself).
        end: when pruning ends, as a share of the training.
        shape: the course of the sparsity over time.
        rank: number of Kronecker terms; "by-area": `own_rank` of the area of each layer's blocks.
        tile_groups: number of tile banks, or "per-row".
        gate: whether blocks have trained gates.
        init: how factors or live blocks start.
        score: how blocks are compared. A method without this setting leaves it to its rule.
        regrow: share of the live blocks that is exchanged at the first mask update.
        distribution: how many live blocks each layer gets, for methods that start sparse.
        form: whether the penalty is in the loss ("gradient") or a step of its own ("proximal").
        strength: of the penalty. "scheduled": what a proximal step needs to follow the schedule; in the loss it means 1.
        growth: factor by which a penalty in the loss has grown at the end.
        ridge: strength of the squared norm, relative to that of the norm.
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
        settings: which of the settings in `Setting` the method has. Setting another one is an error.
        defaults: the values of settings that the user leaves at None.
        revision: raise it when a change alters the results of trainings. Experiments repeat runs of earlier revisions.

    Settings say more: a method with "distribution" has the target sparsity from the first step.
    One with "schedule.lift_at" lifts factors to free values.
    One with "storage" works on the nn.Linear itself, or on live blocks only.
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
        """Whether `init` chooses what it begins with (factors or some blocks). Else it begins with all weights."""
        return "init" in self.settings


def _of(*settings: Setting) -> frozenset[Setting]:
    return frozenset(settings)


def _prune(choices: Choices) -> Rule:
    return Magnitude(choices.score, choices.regrow)


_FACTORS = _of("rank", "tile_groups", "gate", "init")
_PRUNING = _of("score", "regrow", "scope")

METHODS: dict[str, MethodSpec] = {
    "two-phase": MethodSpec(
        _prune,
        _FACTORS | _PRUNING | _of("schedule.shape", "schedule.lift_at"),
        Choices(storage="factors", end=0.4, score="relative"),
        revision=3,
    ),
    "kron-l1": MethodSpec(
        lambda choices: KronL1(choices.form, choices.strength, choices.growth),
        _FACTORS | _of("scope", "penalty", "schedule.shape"),
        Choices(storage="factors", end=0.8, form="gradient", tile_groups=1, init="spectral", gate=True),
        revision=3,
    ),
    "group-lasso": MethodSpec(
        lambda choices: GroupLasso(choices.form, choices.strength, choices.growth),
        _of("scope", "penalty", "schedule.shape"),
        revision=5,
    ),
    "elastic-group-lasso": MethodSpec(
        lambda choices: GroupLasso(choices.form, choices.strength, choices.growth, ridge=choices.ridge),
        _of("scope", "penalty", "penalty.ridge", "schedule.shape"),
        revision=5,
    ),
    "rigl": MethodSpec(
        lambda choices: Rigl(choices.regrow),
        _of("init", "regrow", "distribution", "storage"),
        Choices(storage="packed", end=0.75, regrow=0.3),
        revision=4,
    ),
    "iterative": MethodSpec(_prune, _PRUNING | _of("storage"), Choices(shape="staircase"), revision=3),
    "magnitude": MethodSpec(_prune, _PRUNING | _of("storage", "schedule.shape"), revision=3),
    "static": MethodSpec(lambda _: Fixed(), _of("init", "distribution", "storage"), Choices(storage="packed"), revision=3),
    "dense": MethodSpec(None, _of("schedule.shape")),
}
"""Every method by its name."""

if TYPE_CHECKING:
    Method = str  # users may register others
else:
    Method = Literal[tuple(METHODS)]  # what command lines offer


def spec_of(method: str) -> MethodSpec:
    """The entry of a method; KronblocksError if there is none of this name."""
    one_of("method", method, METHODS)
    return METHODS[method]


def register_method(name: str, spec: MethodSpec) -> None:
    """Give a method of your own a name, for `SparsityConfig(method=name)` and config files.

    A single training needs no name: give `sparsify_` the rule.

    Raises:
        KronblocksError: the name is taken, or the spec is one that no training could use.

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
"""Default rank of candidates that are trained together: equal for all, so that they differ in their block size only."""


def own_rank(area: int) -> int:
    """The default rank for blocks of this many weights: a quarter of them, from 2 to 8.

    Measured (docs/experiments.md): at 16x16 tuning prefers 8 to 4. At 4x4 it does too, by 0.1 to 1.1 points of validation
    accuracy in one or two seeds. With the other defaults five seeds show no difference, and 8 has twice the factors.

    >>> own_rank(4), own_rank(16), own_rank(256)
    (2, 4, 8)
    """
    return min(area, max(2, min(8, area // 4)))
