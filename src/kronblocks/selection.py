"""Which layers become sparse, with which blocks, and why the others stay dense."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from kronblocks.blocks import BlockGrid, BlockSize
from kronblocks.config import SparsityConfig
from kronblocks.errors import DoesNotFit, KronblocksError
from kronblocks.methods import own_rank
from kronblocks.nn.base import BlockLayer
from kronblocks.nn.kron_linear import KroneckerBlockLinear
from kronblocks.nn.unfolded import Unfolded
from kronblocks.ranks import RankChoice, choose_ranks

_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
"""Of weights that can be block-sparse."""

_BY_WEIGHT = 0
"""The rank of a layer whose weight decides it."""


@dataclass(frozen=True)
class Selected:
    """A layer that becomes sparse."""

    name: str
    grid: BlockGrid
    rank: int
    tile_groups: int
    note: str = ""  # where the block size is not the one asked for
    error: float | None = None  # |W - start| / |W| where the layer starts from a weight W that was there; None: it starts anew

    def __str__(self) -> str:
        words = [self.note] * bool(self.note)
        if self.error is not None:
            words.append(f"start within {self.error:.3f} of the weight, relatively")
        return f"{self.name}: {self.grid}" + (f" ({'; '.join(words)})" if words else "")


@dataclass(frozen=True)
class LeftDense:
    """A layer that stays dense, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class SurgeryReport:
    """What `sparsify_` replaced or targeted, and what it left dense. Print it for a table."""

    selected: tuple[Selected, ...]
    left_dense: tuple[LeftDense, ...]

    def folded(self, left: Iterable[str], found: Mapping[str, str]) -> SurgeryReport:
        """The same once unfolded layers that were not selected have been put back, with the reasons of those never unfolded."""
        names = {f"{name}.linear": name for name in left}
        dense = [LeftDense(names.get(each.name, each.name), each.reason) for each in self.left_dense]
        return SurgeryReport(self.selected, (*dense, *(LeftDense(name, reason) for name, reason in found.items() if reason)))

    def __str__(self) -> str:
        lines = [f"sparse: {each}" for each in self.selected]
        lines += [f"dense:  {each.name}: {each.reason}" for each in self.left_dense]
        return "\n".join(lines)


class _Names:
    """Modules with the names and types of everything around them."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())

    def around(self, name: str) -> set[str]:
        """Type names of a module and of all modules that contain it, the model itself not among the latter."""
        parts = name.split(".")
        paths = [".".join(parts[: i + 1]) for i in range(len(parts))]
        return {kind.__qualname__ for path in paths for kind in type(self.modules[path]).__mro__[:-1]}

    def unfolded(self, name: str) -> Unfolded | None:
        """What is around a layer that is the linear one of an unfolded one."""
        parent = self.modules[name.rpartition(".")[0]] if "." in name else None
        return parent if isinstance(parent, Unfolded) else None

    def matches(self, name: str, pattern: str) -> bool:
        if self.unfolded(name) is not None and self.matches_name(name.rpartition(".")[0], pattern):
            return True  # under the name that the convolution has
        return self.matches_name(name, pattern)

    def matches_name(self, name: str, pattern: str) -> bool:
        if pattern.startswith("re:"):
            return re.fullmatch(pattern[3:], name) is not None
        if pattern.startswith("type:"):
            return pattern[5:] in self.around(name)
        return fnmatch.fnmatchcase(name, pattern)


def _check_patterns(patterns: tuple[str, ...], names: _Names, candidates: list[str], what: str) -> None:
    for pattern in patterns:
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise KronblocksError(f"{what} pattern {pattern!r} is no regular expression: {error}") from error
        if pattern != "*" and not any(names.matches(name, pattern) for name in candidates):
            near = difflib.get_close_matches(pattern, candidates, n=3, cutoff=0.4) or candidates[:5]
            raise KronblocksError(f"{what} pattern {pattern!r} matches no nn.Linear layer; there are {', '.join(near)}, ...")


def _shared_weights(model: nn.Module) -> dict[int, list[str]]:
    """Names under which each parameter object stands, where there are several owners."""
    owners: dict[int, list[str]] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(f"{module_name}.{name}" if module_name else name)
    return {key: names for key, names in owners.items() if len(names) > 1}


def _fit(module: nn.Linear, wanted: BlockSize, on_mismatch: str, around: Unfolded | None) -> tuple[BlockGrid | None, str]:
    rows, cols = module.out_features, module.in_features if around is None else around.block_cols_divide
    if rows % wanted.rows == 0 and cols % wanted.cols == 0:
        return BlockGrid(rows, module.in_features, wanted), ""
    fitted = BlockGrid.fit(rows, cols, wanted).block
    if fitted.area == 1:
        return None, f"{wanted} does not divide {rows}x{cols}, and nothing above 1x1 divides both"
    if on_mismatch == "nearest":
        return BlockGrid(rows, module.in_features, fitted), f"{wanted} does not divide, {fitted} does"
    return None, f"{wanted} does not divide {rows}x{cols} (on_mismatch='nearest' would take {fitted})"


def _settings(name: str, names: _Names, config: SparsityConfig) -> dict:
    settings = {"block_size": config.block, "rank": config.rank, "tile_groups": config.tiles}
    for pattern, override in config.overrides.items():
        if names.matches(name, pattern):
            settings |= {key: value for key in settings if (value := getattr(override, key)) is not None}
    return settings


def _select_one(name: str, module: nn.Module, names: _Names, config: SparsityConfig) -> Selected | LeftDense:
    if isinstance(module, KroneckerBlockLinear):
        assert module.rank is not None
        return Selected(name, module.grid, module.rank, module.tile_groups, "a Kronecker layer already, goes on with its blocks")
    settings = _settings(name, names, config)
    if isinstance(module, BlockLayer):
        grid, note = module.grid, "block-sparse already, goes on with its blocks"
    else:
        assert isinstance(module, nn.Linear)
        grid, note = _fit(module, settings["block_size"], config.on_mismatch, names.unfolded(name))
    if grid is None:
        return LeftDense(name, note)
    block_rows = grid.shape[0]
    groups = block_rows if settings["tile_groups"] == "per-row" else settings["tile_groups"]
    if config.on_mismatch == "nearest":
        groups = math.gcd(groups, block_rows)
    if block_rows % groups:
        return LeftDense(name, f"tile_groups={groups} does not divide its {block_rows} block rows")
    if settings["rank"] is None:
        return Selected(name, grid, own_rank(grid.block.area), groups, note)
    if isinstance(settings["rank"], RankChoice):
        return Selected(name, grid, _BY_WEIGHT, groups, note)
    return Selected(name, grid, min(settings["rank"], grid.block.area), groups, note)


def _with_ranks(selected: list[Selected], linears: Mapping[str, nn.Module], config: SparsityConfig) -> list[Selected]:
    """Put the ranks in that the weights decide."""
    undecided = [each for each in selected if each.rank == _BY_WEIGHT]
    if not undecided:
        return selected
    assert isinstance(config.rank, RankChoice)
    modules = [linears[each.name] for each in undecided]
    if any(next(module.parameters(recurse=False)).is_meta for module in modules):
        raise KronblocksError(
            "RankChoice goes by the weights, and the model is on the meta device: load it first, or give a rank"
        )
    weights = [weight.detach() for module in modules if isinstance(weight := module.weight, Tensor)]
    layers = [(weight, each.grid, each.tile_groups) for weight, each in zip(weights, undecided, strict=True)]
    ranks = dict(zip((each.name for each in undecided), choose_ranks(config.rank, layers), strict=True))
    return [
        dataclasses.replace(each, rank=ranks[each.name], note="; ".join(filter(None, (each.note, f"rank {ranks[each.name]}"))))
        if each.name in ranks
        else each
        for each in selected
    ]


def _why_not(name: str, module: nn.Module, shared: dict[int, list[str]], names: _Names, config: SparsityConfig) -> str | None:
    """The reason for leaving an nn.Linear dense before its sizes are looked at, or None."""
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return _ATTENTION
    if not isinstance(module, BlockLayer) and type(module) is not nn.Linear:
        return f"{type(module).__name__} is a subclass of nn.Linear, whose code may need its weight as it is"
    if isinstance(module, nn.Linear) and "weight" not in module._parameters:
        return "its weight is computed from others (spectral_norm, weight_norm or prune), which a block layer would drop"
    weight = next(module.parameters(recurse=False))
    if isinstance(weight, nn.UninitializedParameter):
        return "its weight has no shape yet (a lazy layer): run one batch through the model first"
    if weight.dtype not in _DTYPES:
        return f"its weight is {weight.dtype}, and blocks are compared and multiplied as real floating-point numbers"
    if id(weight) in shared:
        others = [other for other in shared[id(weight)] if not other.startswith(f"{name}.")]
        return f"its weight is tied to {', '.join(others)}"
    if not any(names.matches(name, pattern) for pattern in config.layers if isinstance(pattern, str)):
        return "no pattern of layers matches it"
    excluded = [pattern for pattern in config.exclude if isinstance(pattern, str) and names.matches(name, pattern)]
    return f"excluded by {excluded[0]!r}" if excluded else None


def select(model: nn.Module, config: SparsityConfig) -> SurgeryReport:
    """Decide what `sparsify_` would do, without doing it.

    Raises:
        KronblocksError: a pattern that matches nothing, nothing selected at all, weights that are not finite, or a model that
            is a single layer itself.
    """
    if isinstance(model, nn.Linear):
        raise KronblocksError(
            "the model is itself an nn.Linear, which cannot be replaced in place: wrap it in nn.Sequential(...)"
        )
    names, shared = _Names(model), _shared_weights(model)
    linears = {name: module for name, module in names.modules.items() if isinstance(module, nn.Linear | BlockLayer)}
    if not linears:
        raise KronblocksError("the model has no nn.Linear layer, so there is nothing to make block-sparse")
    for what in ("layers", "exclude", "heads", "overrides"):
        patterns = tuple(getattr(config, what))
        _check_patterns(tuple(p for p in patterns if isinstance(p, str)), names, list(linears), what)
    selected, left = [], []
    for name, module in linears.items():
        reason = _why_not(name, module, shared, names, config)
        decision = LeftDense(name, reason) if reason else _select_one(name, module, names, config)
        (selected if isinstance(decision, Selected) else left).append(decision)
    left += [
        LeftDense(f"{name}.in_proj".lstrip("."), _ATTENTION) for name, each in names.modules.items() if _has_fused_input(each)
    ]
    if not selected:
        report = SurgeryReport((), tuple(left))
        raise DoesNotFit(f"no layer was selected, so nothing would be sparse:\n{report}")
    for each in selected:
        weight = next(linears[each.name].parameters(recurse=False))
        if not weight.is_meta and not torch.isfinite(weight).all():
            raise KronblocksError(
                f"the weight of {each.name} has values that are not finite (NaN or infinity): mend or reload it"
            )
    return SurgeryReport(tuple(_with_ranks(selected, linears, config)), tuple(left))


def named_heads(model: nn.Module, report: SurgeryReport, config: SparsityConfig) -> tuple[str, ...] | None:
    """The selected layers that match a pattern of `heads`; None where the config names none, and they are to be found."""
    if not config.heads:
        return None
    names, patterns = _Names(model), [pattern for pattern in config.heads if isinstance(pattern, str)]
    return tuple(each.name for each in report.selected if any(names.matches(each.name, pattern) for pattern in patterns))


_ATTENTION = (
    "nn.MultiheadAttention hands its weights to one fused function and calls no layer; write the attention with nn.Linear layers "
    "and scaled_dot_product_attention, as transformers does, and they are taken"
)


def _has_fused_input(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention)
