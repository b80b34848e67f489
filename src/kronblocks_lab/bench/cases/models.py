"""The models of `kronblocks bench step`: one MLP with two large layers, which are dense, factored or block-sparse."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kronblocks.nn.base import BlockLayer
from kronblocks.ops import BlockGrid, BlockSize
from kronblocks_lab.bench.cases import peers
from kronblocks_lab.bench.cases.ways import AUTHORS, auto_plan_, factors_layer, random_mask, values_layer
from kronblocks_lab.bench.settings import StepSettings

CLASSES = 10
LASSO = 1e-3  # times the sum over layers of the mean norm of a block
PACKED_DENSITY = 0.1
PACKED_BLOCKS = (4, 8, 16, 64)
AUTHORS_KINDS = ((1, 8), (1, 16), (4, 8), (4, 16))  # rank, block
# rank, block, tiles for each block row; the last is the default of two-phase
FACTORS_KINDS = ((1, 8, False), (4, 16, False), (4, 16, True), (8, 16, True))
GRID_OF_AUTHORS = tuple((rank, block) for rank in (1, 2, 4) for block in (2, 4, 8))  # of --authors
QUICK = ("dense", "authors two products r=1 8x8", "factors r=1 8x8", "factors r=4 16x16", "packed 90% 16x16")


class Place(NamedTuple):
    """Where a model is, and its dtype."""

    device: str
    dtype: torch.dtype


class StepModel(NamedTuple):
    """A model to train: how to make its two large layers, and what is added to the loss."""

    name: str
    layer: Callable[[int, int, Place], nn.Module]  # width, rows
    lasso: bool = False
    compiled: bool = False


def _grid(width: int, block: int) -> BlockGrid:
    return BlockGrid(width, width, BlockSize(block, block))


def _all_live(grid: BlockGrid) -> Tensor:
    return torch.ones(grid.shape, dtype=torch.bool)


def _dense(width: int, rows: int, place: Place) -> nn.Module:
    return nn.Linear(width, width, device=place.device, dtype=place.dtype)


def _with_plan(layer: BlockLayer, plan: str, rows: int) -> nn.Module:
    if plan == "auto":
        auto_plan_(layer, rows, training=True)
    else:
        layer.use_plan_(plan)
    return layer


def _factors(rank: int, block: int, per_row: bool, plan: str, width: int, rows: int, place: Place) -> nn.Module:
    grid = _grid(width, block)
    return _with_plan(factors_layer(grid, _all_live(grid), rank, per_row, *place), plan, rows)


def _authors(form: type[peers.AuthorsLayer], rank: int, block: int, width: int, rows: int, place: Place) -> nn.Module:
    grid = _grid(width, block)
    return form(factors_layer(grid, _all_live(grid), rank, False, *place))


def _values(block: int, plan: str, width: int, rows: int, place: Place) -> nn.Module:
    grid = _grid(width, block)
    mask = random_mask(grid, PACKED_DENSITY, torch.Generator().manual_seed(int(torch.randint(2**31, ()))))
    return _with_plan(values_layer(grid, mask, *place), plan, rows)


def step_models(settings: StepSettings) -> list[StepModel]:
    """All models, dense first."""
    grid = settings.authors
    models = [StepModel("dense", _dense), StepModel("dense, group LASSO 16x16", _dense, lasso=True)]
    for rank, block in GRID_OF_AUTHORS if grid else AUTHORS_KINDS:
        for name, form in AUTHORS.items():
            make = functools.partial(_authors, form, rank, block)
            models.append(StepModel(f"{name} r={rank} {block}x{block}", make))
    if settings.compiled:
        models += [model._replace(name=f"{model.name}, compiled", compiled=True) for model in models]
    kinds = [(rank, block, False) for rank, block in GRID_OF_AUTHORS] if grid else FACTORS_KINDS
    for rank, block, per_row in kinds:
        for plan in ("coeff_first", "auto") if per_row else ("tile_first", "coeff_first", "auto"):
            name = f"factors r={rank} {block}x{block}{' per-row' if per_row else ''} {plan}"
            models.append(StepModel(name, functools.partial(_factors, rank, block, per_row, plan)))
    for block in () if grid else PACKED_BLOCKS:
        for plan in ("packed", "auto"):
            name = f"{'packed' if plan == 'packed' else 'auto'} 90% {block}x{block}"
            models.append(StepModel(name, functools.partial(_values, block, plan)))
    return models


class Mlp(nn.Module):
    """width - width - width - 10, ReLU between; the last layer is dense."""

    def __init__(self, kind: StepModel, width: int, rows: int, place: Place) -> None:
        super().__init__()
        self.large = nn.ModuleList(kind.layer(width, rows, place) for _ in range(2))
        self.last = nn.Linear(width, CLASSES, device=place.device, dtype=place.dtype)
        self._lasso = _grid(width, 16) if kind.lasso else None

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.large:
            x = torch.relu(layer(x))
        return self.last(x)

    def penalty(self) -> Tensor | float:
        """What is added to the loss: 0 but for group LASSO."""
        if self._lasso is None:
            return 0.0
        return LASSO * sum(group_lasso_of(layer, self._lasso) for layer in self.large)


def group_lasso_of(layer: nn.Module, grid: BlockGrid) -> Tensor:
    """The penalty of one dense layer."""
    assert isinstance(layer, nn.Linear)
    return peers.group_lasso(layer.weight, grid)


def plan_of(model: Mlp) -> str | None:
    """The plan that the block layers compute with, None where there are none."""
    layer = model.large[0]
    return layer.active_plan if isinstance(layer, BlockLayer) else None
