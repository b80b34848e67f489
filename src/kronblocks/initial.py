"""What stands in a layer's place at first: factors or live blocks, new or from the weights that are there."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from kronblocks.config import SparsityConfig
from kronblocks.errors import KronblocksError, KronblocksWarning, PerformanceWarning
from kronblocks.methods import CONSTANT, FACTORED
from kronblocks.nn.base import BlockLayer
from kronblocks.nn.block_sparse_linear import BlockSparseLinear
from kronblocks.nn.kron_linear import KroneckerBlockLinear
from kronblocks.selection import Selected, SurgeryReport
from kronblocks.shards import whole
from kronblocks.sparsity.budget import random_masks, strongest_masks


def factored(linear: nn.Module, selected: Selected, config: SparsityConfig) -> KroneckerBlockLinear:
    """The Kronecker layer that takes a dense one's place, initialised as the config says; one that is there already stays."""
    if isinstance(linear, KroneckerBlockLinear):
        if config.has_gate and linear.gate is None:
            linear.gate = nn.Parameter(torch.ones_like(linear.coeff[..., 0]))
            linear.enforce_zeros_()
        return linear
    assert isinstance(linear, nn.Linear)
    init, weight = config.chosen_init, linear.weight
    shape: dict[str, Any] = {"rank": selected.rank, "tile_groups": selected.tile_groups, "gate": config.has_gate}
    if init == "random" or weight.is_meta:
        layer = KroneckerBlockLinear(
            linear.in_features,
            linear.out_features,
            selected.grid.block,
            bias=linear.bias is not None,
            device=weight.device,
            dtype=weight.dtype,
            **shape,
        )
    else:
        layer = KroneckerBlockLinear.from_linear(linear, block_size=selected.grid.block, **shape)
    if init != "nearest" and not weight.is_meta:
        layer.match_variance_(weight)
    layer.bias = linear.bias
    if config.rows is not None:
        layer.choose_plan_(config.rows)
    for parameter in layer.block_parameters():
        parameter.requires_grad_(weight.requires_grad)
    return layer.train(linear.training)


def packed(linear: nn.Module, selected: Selected, mask: Tensor, config: SparsityConfig) -> BlockLayer:
    """The live blocks of an nn.Linear, in a layer that has no others."""
    assert isinstance(linear, nn.Linear)
    layer = BlockSparseLinear.from_dense(linear, block_size=selected.grid.block, mask=mask)
    layer.bias = linear.bias
    layer.values.requires_grad_(linear.weight.requires_grad)
    layer.choose_plan_(config.rows)
    return layer


def first_masks(model: nn.Module, report: SurgeryReport, config: SparsityConfig) -> dict[str, Tensor]:
    """The blocks of each layer that are live at first: of methods that are constantly sparse as many as in the end, else all."""
    names = [each.name for each in report.selected]
    shapes, areas = [each.grid.shape for each in report.selected], [each.grid.block.area for each in report.selected]
    distribution = config.distribution or "erk"
    if config.method not in CONSTANT:
        masks = [torch.ones(shape, dtype=torch.bool) for shape in shapes]
    elif config.chosen_init == "random":
        masks = random_masks(shapes, areas, config.target_sparsity, distribution)
    else:
        weights = [whole(next(model.get_submodule(name).parameters(recurse=False)).detach()) for name in names]
        if any(weight.is_meta for weight in weights):
            raise KronblocksError(
                "init='nearest' goes by the weights, and the model is on the meta device: load it first, or write init='random'"
            )
        norms = [each.grid.norms(weight) for each, weight in zip(report.selected, weights, strict=True)]
        masks = strongest_masks(norms, areas, config.target_sparsity, distribution)
    return dict(zip(names, masks, strict=True))


@torch.no_grad()
def relative_error(old: nn.Linear, new: BlockLayer) -> float:
    """|W - layer's weight| / |W|, Frobenius norms."""
    weight = old.weight.double()
    total = float(torch.linalg.vector_norm(weight))
    return float(torch.linalg.vector_norm(weight - new.dense_weight().double())) / total if total else 0.0


def warn_of_dropped_weights(model: nn.Module, report: SurgeryReport, config: SparsityConfig) -> None:
    """Say so when weights that look trained would be replaced by new random ones without the user having asked for it."""
    if config.method not in FACTORED | CONSTANT or config.init is not None or config.own.init != "random":
        return
    for each in report.selected:
        layer = model.get_submodule(each.name)
        if isinstance(layer, nn.Linear) and _looks_trained(layer.weight):
            what = "replaces them by new factors" if config.method in FACTORED else "keeps random blocks of them"
            warnings.warn(
                f"the weight of {each.name} looks trained, and method {config.method!r} {what}: write "
                "SparsityConfig(init='nearest') to start from the present weights, or init='random' to start anew",
                KronblocksWarning,
                stacklevel=4,
            )
            return


@torch.no_grad()
def _looks_trained(weight: Tensor) -> bool:
    """Whether the largest singular value is far above that of independent random entries of the same variance.

    Their edge is at sigma (sqrt(m) + sqrt(n)), and fluctuates little in large matrices (Marchenko and Pastur, 1967); small ones
    are given the benefit of the doubt.
    """
    if weight.is_meta or min(weight.shape) < 32:
        return False
    values = whole(weight).float()
    (m, n), vector = values.shape, torch.ones(values.shape[1], device=values.device, dtype=values.dtype)
    for _ in range(10):
        vector = torch.nn.functional.normalize(values.T @ (values @ vector), dim=0)
    largest = float(torch.linalg.vector_norm(values @ vector))
    return largest > 1.3 * float(values.std()) * (math.sqrt(m) + math.sqrt(n))


def warn_of_rank(report: SurgeryReport) -> None:
    """Say so when factors save nothing."""
    for each in report.selected:
        if each.rank >= each.grid.block.area:
            warnings.warn(
                f"rank {each.rank} in blocks of {each.grid.block} ({each.name}) trains as many factors as there are weights: "
                "take a lower rank or larger blocks",
                PerformanceWarning,
                stacklevel=4,
            )
            return
