"""Select the layers that become sparse, with their blocks, and say why the others stay dense."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import nn

from kronblocks.config.methods import own_rank
from kronblocks.config.ranks import RankChoice
from kronblocks.config.sparsity import SparsityConfig
from kronblocks.core.blocks import BlockGrid, BlockSize
from kronblocks.core.errors import DoesNotFit, KronblocksError, KronblocksWarning
from kronblocks.core.tables import some
from kronblocks.nn.base import BlockLayer
from kronblocks.nn.kron_linear import KroneckerBlockLinear
from kronblocks.surgery.patterns import Layer, Names, check_expressions, texts
from kronblocks.surgery.ranks import choose_ranks
from kronblocks.surgery.reasons import (
    check_model,
    check_values,
    is_convolution,
    is_embedding,
    is_matrix,
    is_ready,
    outside,
    shared_weights,
    why_not,
)
from kronblocks.surgery.report import LeftDense, Selected, SurgeryReport

_BY_WEIGHT = 0
"""The rank of a layer whose weight decides it."""


class _Why(NamedTuple):
    """Why a layer stays dense, and whether the user chose so."""

    reason: str
    by_choice: bool = False


def _fit(layer: Layer, wanted: BlockSize, on_mismatch: str) -> tuple[BlockGrid | None, str]:
    rows, in_features = layer.sizes
    cols = layer.cols_divide or in_features
    if rows % wanted.rows == 0 and cols % wanted.cols == 0:
        return BlockGrid(rows, in_features, wanted), ""
    fitted = BlockGrid.fit(rows, cols, wanted).block
    if fitted.area == 1:
        return None, f"{wanted} does not divide {rows}x{cols}, and they have no common divisor above 1x1"
    if on_mismatch == "nearest":
        return BlockGrid(rows, in_features, fitted), f"{wanted} does not divide, {fitted} does"
    return None, f"{wanted} does not divide {rows}x{cols} (on_mismatch='nearest' would take {fitted})"


def _settings(layer: Layer, names: Names, config: SparsityConfig) -> dict:
    choices = config.resolved()
    settings = {"block_size": config.block, "rank": choices.rank, "tile_groups": choices.tile_groups}
    for pattern, override in config.overrides.items():
        if names.matches(layer, pattern):
            settings |= {key: value for key in settings if (value := getattr(override, key)) is not None}
    return settings


def _sized(layer: Layer, names: Names, config: SparsityConfig) -> Selected | _Why:
    if isinstance(layer.module, KroneckerBlockLinear):
        there = layer.module
        assert there.rank is not None
        note = "a Kronecker layer already, goes on with its blocks"
        return Selected(layer.name, there.grid, there.rank, there.tile_groups, note)
    settings = _settings(layer, names, config)
    if isinstance(layer.module, BlockLayer):
        grid, note = layer.module.grid, "block-sparse already, goes on with its blocks"
    else:
        grid, note = _fit(layer, settings["block_size"], config.on_mismatch)
    if grid is None:
        return _Why(note)
    block_rows = grid.shape[0]
    groups = block_rows if settings["tile_groups"] == "per-row" else settings["tile_groups"]
    if config.on_mismatch == "nearest":
        groups = math.gcd(groups, block_rows)
    if block_rows % groups:
        return _Why(f"tile_groups={groups} does not divide its {block_rows} block rows")
    if settings["rank"] == "by-area":
        return Selected(layer.name, grid, own_rank(grid.block.area), groups, note)
    if isinstance(settings["rank"], RankChoice):
        return Selected(layer.name, grid, _BY_WEIGHT, groups, note)
    return Selected(layer.name, grid, min(settings["rank"], grid.block.area), groups, note)


def _decide(layer: Layer, names: Names, shared: dict[int, list[str]], config: SparsityConfig) -> Selected | _Why:
    name = layer.name if layer.is_there else layer.place
    replaces = replaces_layers(config) or not layer.is_there
    if reason := why_not(name, layer.module, shared, convolutions=config.convolutions, replaces=replaces):
        return _Why(reason)
    if not any(names.matches(layer, pattern) for pattern in texts(config.layers)):
        return _Why("no pattern of layers matches it", by_choice=True)
    for pattern in texts(config.exclude):
        if names.matches(layer, pattern):
            return _Why(f"excluded by {pattern!r}", by_choice=True)
    if adapter := names.adapter(layer.place):
        return _Why(f"part of an adapter ({adapter}), which is small and stays dense", by_choice=True)
    sized = _sized(layer, names, config)
    if isinstance(sized, Selected) and config.frozen == "keep" and _is_frozen(layer):
        return _Why(_FROZEN, by_choice=True)
    return sized


_FROZEN = "frozen (requires_grad=False), so it stays as it is; frozen='sparsify' treats it like the others"


def _is_frozen(layer: Layer) -> bool:
    return not any(parameter.requires_grad for parameter in layer.values)


def _check_frozen(selected: Sequence[Selected], layers: dict[str, Layer], config: SparsityConfig) -> None:
    """Refuse methods that cannot work on frozen layers, if some are selected."""
    frozen = [each.name for each in selected if _is_frozen(layers[each.name])]
    if not frozen:
        return
    starts_anew = not all(isinstance(layers[name].module, BlockLayer) for name in frozen)
    if starts_anew and config.spec.draws_start and config.init is None and config.resolved().init == "random":
        what = "factors" if config.spec.is_factored else "blocks of its weight"
        raise KronblocksError(
            f"{frozen[0]} is frozen, and method {config.method!r} would leave it with random {what} that are never trained: "
            "write init='nearest' to start from its weight, or init='random' if you mean that"
        )
    if config.resolved().score == "taylor":
        raise KronblocksError(f"score='taylor' needs gradients, but {frozen[0]} is frozen: write score='norm', or frozen='keep'")


def _with_ranks(selected: list[Selected], layers: dict[str, Layer], config: SparsityConfig) -> list[Selected]:
    """Fill in the ranks that depend on weights."""
    undecided = [each for each in selected if each.rank == _BY_WEIGHT]
    if not undecided:
        return selected
    assert isinstance(config.rank, RankChoice)
    if any(value.is_meta for each in undecided for value in layers[each.name].values):
        raise KronblocksError(
            "RankChoice chooses by the weights, but the model is on the meta device: load it first, or give a rank"
        )
    weights = [(layers[each.name].weight(), each.grid, each.tile_groups) for each in undecided]
    ranks = dict(zip((each.name for each in undecided), choose_ranks(config.rank, weights), strict=True))
    return [
        dataclasses.replace(each, rank=ranks[each.name], note="; ".join(filter(None, (each.note, f"rank {ranks[each.name]}"))))
        if each.name in ranks
        else each
        for each in selected
    ]


class _Ledger:
    """Counts a model's weights once each: those that become sparse, and those that stay dense without the user's choice."""

    def __init__(self, model: nn.Module) -> None:
        sizes = {id(p): p.numel() for p in model.parameters() if is_ready(p)}
        self._sizes, self._missed, self._chosen, self.weights = sizes, set(), set(), sum(sizes.values())
        self._left: list[tuple[str, _Why, int]] = []

    def target(self, parameters: Iterable[nn.Parameter], weights: int) -> None:
        """Count a layer that becomes sparse, with this many weights."""
        keys = {id(p) for p in parameters}
        self._chosen |= keys
        self.weights += weights - sum(self._sizes[key] for key in keys)

    def leave(self, name: str, parameters: Iterable[nn.Parameter], why: _Why) -> None:
        """Count a module that stays dense."""
        keys = {id(p) for p in parameters if is_matrix(p)}
        (self._chosen if why.by_choice else self._missed).update(keys)
        self._left.append((name, why, sum(self._sizes[key] for key in keys)))

    def report(self, selected: Sequence[Selected]) -> SurgeryReport:
        """The report of what was counted."""
        left = [LeftDense(name, why.reason, held / max(self.weights, 1), why.by_choice) for name, why, held in self._left]
        missed = sum(self._sizes[key] for key in self._missed - self._chosen)
        return SurgeryReport(tuple(selected), tuple(left), self.weights, missed)


def replaces_layers(config: SparsityConfig) -> bool:
    """Whether a method replaces nn.Linear by block layers, instead of masking it."""
    return config.resolved().storage != "dense"


def select(model: nn.Module, config: SparsityConfig) -> SurgeryReport:
    """Report what `sparsify_` would do, without doing it.

    Layers inside convolutions and Conv1D have the names that `sparsify_` would give them.

    Raises:
        KronblocksError: a pattern matches nothing; nothing is selected; weights are not finite; or the model cannot be
            changed in place (a single layer, TorchScript, wrapped for several processes, made in inference mode).
    """
    replaces = replaces_layers(config)
    check_model(model, replaces=replaces)
    names, shared, ledger = Names(model), shared_weights(model), _Ledger(model)
    layers = {layer.name: layer for layer in names.layers()}
    elsewhere = list(outside(model, {layer.place for layer in layers.values()}))
    known = list(dict.fromkeys(name for layer in layers.values() for name in (layer.place, layer.name)))
    for what in ("layers", "exclude", "heads", "overrides"):
        patterns = texts(getattr(config, what))
        check_expressions(what, patterns)
        if layers:
            others = [name for name, *_ in elsewhere] if what == "exclude" else []
            names.check(what, patterns, [*known, *others])
    selected, frozen = [], []
    for layer in layers.values():
        decision = _decide(layer, names, shared, config)
        if isinstance(decision, Selected):
            selected.append(decision)
            ledger.target(layer.values, decision.grid.weights)
        else:
            ledger.leave(layer.name if layer.is_there else layer.place, layer.module.parameters(), decision)
            frozen += [layer.place] if decision.reason == _FROZEN else []
    for name, module, parameters, reason in elsewhere:
        ledger.leave(name, parameters, _why_elsewhere(name, module, reason, names, config))
    if not selected:
        _refuse_nothing(ledger.report(()), layers, frozen, config)
    _check_frozen(selected, layers, config)
    for each in selected:
        check_values(layers[each.name].place, layers[each.name].module, replaces=replaces)
    return ledger.report(_with_ranks(selected, layers, config))


def named_heads(model: nn.Module, report: SurgeryReport, config: SparsityConfig) -> tuple[str, ...] | None:
    """The selected layers that match the config's `heads`; None if it names none, so that they have to be found."""
    if not config.heads:
        return None
    names, patterns = Names(model), texts(config.heads)
    layers = {layer.name: layer for layer in names.layers()}
    return tuple(each.name for each in report.selected if any(names.matches(layers[each.name], text) for text in patterns))


def _why_elsewhere(name: str, module: nn.Module, reason: str, names: Names, config: SparsityConfig) -> _Why:
    if not any(names.matches_name(name, pattern) for pattern in texts(config.layers)):
        return _Why(reason, by_choice=True)
    for pattern in texts(config.exclude):
        if names.matches_name(name, pattern):
            return _Why(f"excluded by {pattern!r}", by_choice=True)
    return _Why(reason, by_choice=is_embedding(module))


def _refuse_nothing(report: SurgeryReport, layers: dict[str, Layer], frozen: list[str], config: SparsityConfig) -> None:
    """Raise an error that says why nothing was selected."""
    if frozen:
        raise KronblocksError(
            f"every layer that could become sparse is frozen ({some(frozen, 3)}: "
            "requires_grad=False): unfreeze layers before sparsify_, or write frozen='sparsify'"
        )
    if any(config.convolutions or not is_convolution(layer.module) for layer in layers.values()):
        raise DoesNotFit(f"no layer was selected, so nothing would be sparse:\n{report}")
    listed = f":\n{report}" if report.left_dense else ""
    raise KronblocksError(f"the model has no nn.Linear layer, so there is nothing to make block-sparse{listed}")


def warn_of_missed(report: SurgeryReport) -> None:
    """Warn if more weights are `missed` (see `SurgeryReport`) than become sparse."""
    if report.targeted >= report.missed:
        return
    warnings.warn(
        f"only {100 * report.targeted / report.weights:.1f}% of the model's weights are in layers that become sparse "
        f"({report.most_missed()} stay dense): print(sparsifier.surgery) gives the reasons. Name what should stay dense "
        "in exclude=(...)",
        KronblocksWarning,
        stacklevel=3,
    )
