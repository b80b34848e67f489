"""SparsityConfig: everything a user sets, written as JSON with a version."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kronblocks.algorithms.rules.base import Rule
from kronblocks.config.methods import METHODS, Choices, MethodSpec, Setting
from kronblocks.config.parts import (
    BlockSettings,
    LayerOverride,
    MethodChoice,
    MethodSettings,
    PenaltyConfig,
    ScheduleConfig,
)
from kronblocks.config.ranks import RankChoice
from kronblocks.core.blocks import BlockSize
from kronblocks.core.checks import number, one_of, whole
from kronblocks.core.errors import KronblocksError

CONFIG_VERSION = 1

Frozen = Literal["keep", "sparsify"]


@dataclass(frozen=True)
class SparsityConfig(MethodSettings, BlockSettings, MethodChoice):
    """Which layers `sparsify_` replaces, with which blocks, by which method.

    `MethodChoice` and `BlockSettings` document `method`, `block_size`, `rank`, `tile_groups` and `on_mismatch`, and
    `MethodSettings` the rest: `gate`, `init`, `score`, `regrow`, `scope`, `distribution`, `storage`, `schedule`, `penalty` and
    `measure_plans`.

    Args:
        target_sparsity: share of the blocks that end as exact zeros, in [0, 1).
        layers: which nn.Linear layers: patterns on the name (`"encoder.*"`), regular expressions (`"re:.*fc[12]"`), or types
            of the layer or of a module around it (`"type:MLP"`, or the class itself).
        exclude: patterns of layers to leave dense.
        heads: patterns of the layers that make the model's output. Each of their block rows keeps a block as long as it can,
            since an output without one is lost. Empty: they are found in the first training steps. rigl and static choose
            blocks before that, and treat every layer that may be a head as one.
        overrides: pattern to `LayerOverride`; later ones win.
        convolutions: also sparsify nn.Conv1d and nn.Conv2d, as linear layers over patches. Blocks do not cross kernel positions.
        frozen: what to do with layers whose weight has requires_grad=False. "keep" leaves them as they are and out of the
            target. "sparsify" treats them like the others, and they stay frozen.
        rows: rows of x per step (batch times tokens), by which plans are chosen. None: what each layer gets in the first step.

    Raises:
        KronblocksError: a value that is not allowed; the message says which are.

    >>> config = SparsityConfig(block_size="16x4", target_sparsity=0.9)
    >>> SparsityConfig.from_json(config.to_json()) == config
    True
    """

    target_sparsity: float = 0.9
    layers: tuple[str | type, ...] = ("*",)
    exclude: tuple[str | type, ...] = ()
    heads: tuple[str | type, ...] = ()
    overrides: Mapping[str, LayerOverride] = field(default_factory=dict)
    convolutions: bool = False
    frozen: Frozen = "keep"
    rows: int | None = None

    def __post_init__(self) -> None:
        one_of("method", self.method, METHODS)
        MethodSettings.__post_init__(self)
        BlockSettings.__post_init__(self)
        if not isinstance(self.overrides, Mapping):
            raise KronblocksError(f'overrides is a dict such as {{"head": LayerOverride(block_size=8)}}, not {self.overrides!r}')
        one_of("frozen", self.frozen, Frozen)
        if self.rows is not None:
            whole("rows", self.rows, "the rows of x per step")
        if not isinstance(self.convolutions, bool):
            raise KronblocksError(f"convolutions is True or False, not {self.convolutions!r}")
        what = "the share of blocks that end as zeros, from 0 to below 1 (0.9 means 90%)"
        number("target_sparsity", self.target_sparsity, 0, 1, what)
        if self.block_size != "auto":
            object.__setattr__(self, "block_size", BlockSize.parse(self.block_size))
        object.__setattr__(self, "layers", _patterns(self.layers))
        object.__setattr__(self, "exclude", _patterns(self.exclude))
        object.__setattr__(self, "heads", _patterns(self.heads))
        wrong = [key for key, value in self.overrides.items() if not (isinstance(key, str) and isinstance(value, LayerOverride))]
        if wrong:
            raise KronblocksError(f"overrides[{wrong[0]!r}] must be a LayerOverride(...), and its pattern a text")
        self._refuse_ignored()

    def _refuse_ignored(self) -> None:
        """Raise for an option that the method would ignore."""
        method, has, penalty, schedule = self.method, self.spec.settings, self.penalty, self.schedule
        for name, reason in _WITHOUT.items():
            if name == "scope" and self.spec.starts_sparse:
                reason = "has a distribution= of its blocks and no"
            if name not in has and getattr(self, name) != _DEFAULTS[name]:
                raise KronblocksError(f"method {method!r} {reason} {name}: leave {name}={_DEFAULTS[name]!r}")
        for pattern, override in self.overrides.items():
            if not self.spec.is_factored and (override.rank, override.tile_groups) != (None, None):
                raise KronblocksError(
                    f"method {method!r} works on nn.Linear itself: overrides[{pattern!r}] can set block_size only"
                )
        if "penalty" not in has and penalty != PenaltyConfig():
            raise KronblocksError(f"method {method!r} has no penalty: leave penalty=PenaltyConfig()")
        if "penalty.ridge" not in has and penalty.ridge != PenaltyConfig.ridge:
            which = " and ".join(repr(name) for name, spec in METHODS.items() if "penalty.ridge" in spec.settings)
            raise KronblocksError(f"penalty.ridge is for method {which}, not {method!r}: leave penalty.ridge=1.0")
        if "schedule.lift_at" not in has and schedule.lift_at != ScheduleConfig.lift_at:
            raise KronblocksError(f"method {method!r} is never lifted: leave schedule.lift_at at its default")
        if self.spec.starts_sparse and schedule.shape is not None:
            raise KronblocksError(f"method {method!r} is sparse from the first step: leave schedule.shape=None")
        if "schedule.shape" not in has and schedule.shape not in (None, own := self.spec.defaults.shape):
            raise KronblocksError(
                f"method {method!r} always prunes by the shape {own!r}: leave schedule.shape=None, or use method 'magnitude'"
            )
        self._refuse_contradictions()

    def _refuse_contradictions(self) -> None:
        """Raise for an option that another option makes void."""
        method, choices = self.method, self.resolved()
        if "penalty" in self.spec.settings and choices.form == "proximal" and choices.growth != PenaltyConfig.growth:
            raise KronblocksError(
                f"penalty.growth={choices.growth} is for form='gradient', but the penalty of {method!r} is proximal here and "
                "does not grow: leave penalty.growth=3.0, or write PenaltyConfig(form='gradient')"
            )
        if choices.shape != "staircase" and self.schedule.stages != ScheduleConfig.stages:
            raise KronblocksError(
                f"schedule.stages={self.schedule.stages} is for a staircase, but the schedule of {method!r} is {choices.shape} "
                f"here: leave schedule.stages={ScheduleConfig.stages}"
            )
        if self.spec.starts_sparse and choices.init == "spectral":
            raise KronblocksError(f"init='spectral' is for factors, and {method!r} has none: write init='random' or 'nearest'")
        if isinstance(self.rank, RankChoice) and choices.init == "random":
            raise KronblocksError("RankChoice chooses by the present weights, but init='random' drops them: set init='nearest'")
        if choices.score == "gate" and not choices.gate:
            raise KronblocksError(f"score='gate' needs gates, but method {method!r} has none: set gate=True, or score='norm'")

    @property
    def spec(self) -> MethodSpec:
        """The method's entry in `METHODS`."""
        return METHODS[self.method]

    def resolved(self) -> Choices:
        """Every setting that may be None, with the method's default where the user set nothing.

        Layers decide two things: what `rank="by-area"` means for their blocks, and that existing block layers keep their
        weights unless the user set `init`.

        >>> SparsityConfig(method="kron-l1").resolved().score
        'gate'
        """
        penalty, own = self.penalty, self.spec.defaults
        form = penalty.form or own.form
        choices = dataclasses.replace(
            own,
            form=form,
            strength="scheduled" if form == "proximal" else 1.0,
            growth=penalty.growth,
            ridge=penalty.ridge,
        )
        given = {f.name: getattr(self, f.name, None) for f in dataclasses.fields(Choices)}
        given |= {"end": self.schedule.end, "shape": self.schedule.shape, "strength": penalty.strength}
        choices = dataclasses.replace(choices, **{name: value for name, value in given.items() if value is not None})
        return choices if self.spec.rule is None else dataclasses.replace(choices, score=self.spec.rule(choices).score)

    def rule(self) -> Rule | None:
        """The method's algorithm; None for "dense"."""
        return None if self.spec.rule is None else self.spec.rule(self.resolved())

    @property
    def block(self) -> BlockSize:
        """The block size, parsed.

        Raises:
            KronblocksError: it is "auto", and nobody has searched yet.
        """
        if self.block_size == "auto":
            raise KronblocksError(
                'block_size="auto" needs a search: report = find_block_size(model, config, task, total_steps=...), then '
                "sparsify_(model, report.config(config)); or name a size, such as block_size=16"
            )
        return BlockSize.parse(self.block_size)

    def to_dict(self) -> dict[str, Any]:
        """The config as plain values, with the format's version."""

        def plain(value: object) -> object:
            if isinstance(value, BlockSize):
                return str(value)
            if dataclasses.is_dataclass(value) and not isinstance(value, type):
                return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
            if isinstance(value, Mapping):
                return {key: plain(each) for key, each in value.items()}
            return list(value) if isinstance(value, tuple) else value

        fields = plain(self)
        assert isinstance(fields, dict)
        return {"version": CONFIG_VERSION, **fields}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SparsityConfig:
        """Read what `to_dict` gave. An unknown name or another version is an error."""
        if not isinstance(data, Mapping):
            raise KronblocksError(f"a config is a table of names and values, not {type(data).__name__}")
        values = dict(data)
        version = values.pop("version", CONFIG_VERSION)
        if version != CONFIG_VERSION:
            raise KronblocksError(f"the config has version {version!r}, and this kronblocks reads version {CONFIG_VERSION}")
        nested = {"schedule": ScheduleConfig, "penalty": PenaltyConfig}
        for name, kind in nested.items():
            if name in values:
                values[name] = _build(kind, values[name], name)
        if isinstance(values.get("rank"), Mapping):
            values["rank"] = _build(RankChoice, values["rank"], "rank")
        if "overrides" in values:
            values["overrides"] = {
                key: _build(LayerOverride, each, f"overrides[{key!r}]")
                for key, each in _table(values["overrides"], "overrides").items()
            }
        return _build(cls, values, "config")

    def to_json(self) -> str:
        """The config as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> SparsityConfig:
        """Read what `to_json` wrote."""
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise KronblocksError(f"the config is not JSON: {error}") from error

    @classmethod
    def from_file(cls, path: str | Path) -> SparsityConfig:
        """Read a .json or .toml file."""
        path = Path(path)
        try:
            text = path.read_text()
            return cls.from_dict(tomllib.loads(text)) if path.suffix == ".toml" else cls.from_json(text)
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise KronblocksError(f"cannot read the config {path}: {error}") from error


_LINEAR = "keeps free values, not factors, and has no"
_WITHOUT: dict[Setting, str] = {
    "tile_groups": _LINEAR,
    "rank": _LINEAR,
    "gate": _LINEAR,
    "init": "starts from the weights that are there and has no",
    "score": "has no choice of",
    "regrow": "brings no dead blocks back and has no",
    "distribution": "has no",
    "storage": "has no choice of",
    "scope": "has no",
}
"""For each setting, why a method lacks it: "method ... {this} {setting}"."""

_DEFAULTS = {f.name: f.default for f in dataclasses.fields(SparsityConfig)}


def _patterns(patterns: object) -> tuple[str, ...]:
    """Patterns as text; a class becomes "type:" and its name."""
    if isinstance(patterns, str | type):
        patterns = (patterns,)
    if not isinstance(patterns, tuple | list) or not all(isinstance(each, str | type) for each in patterns):
        raise KronblocksError(f'layers, exclude and heads are patterns such as ("encoder.*", "re:.*fc[12]"), not {patterns!r}')
    return tuple(f"type:{each.__qualname__}" if isinstance(each, type) else each for each in patterns)


def _table(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise KronblocksError(f"{where} must be a table of names and values, not {value!r}")
    return value


def _build(kind: type, values: object, where: str) -> Any:
    names = {f.name for f in dataclasses.fields(kind)}
    given = {key: tuple(each) if isinstance(each, list) else each for key, each in _table(values, where).items()}
    unknown = sorted(given.keys() - names)
    if unknown:
        raise KronblocksError(f"{where} has no setting {unknown[0]!r}: there are {', '.join(sorted(names))}")
    return kind(**given)
