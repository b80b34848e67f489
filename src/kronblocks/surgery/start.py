"""Make the first layers of a training: factors or live blocks, random or from the present weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kronblocks.algorithms.distribution import random_scores, strongest_masks
from kronblocks.algorithms.heads import possible_heads
from kronblocks.config.methods import Init
from kronblocks.config.sparsity import SparsityConfig
from kronblocks.core.errors import KronblocksError, KronblocksWarning, PerformanceWarning
from kronblocks.core.shards import whole
from kronblocks.core.tables import some
from kronblocks.nn.base import BlockLayer
from kronblocks.nn.block_sparse_linear import BlockSparseLinear
from kronblocks.nn.kron_linear import KroneckerBlockLinear
from kronblocks.surgery.report import Selected, SurgeryReport


def first_init(layer: nn.Module, config: SparsityConfig) -> Init:
    """How the blocks of a layer start. Those of block layers stay, unless the config sets `init`."""
    return "nearest" if config.init is None and isinstance(layer, BlockLayer) else config.resolved().init


def first_layer(layer: nn.Module, selected: Selected, mask: Tensor, config: SparsityConfig) -> nn.Module:
    """The layer to begin with, in place of another. It is the same one if the method works on it as it is.

    Args:
        layer: nn.Linear, or a block layer.
        selected: its block size, rank and tile banks.
        mask: (m1, n1) bool, True = live at first.
        config: the user's settings.
    """
    if config.spec.is_factored:
        return factored(layer, selected, mask, config)
    if isinstance(layer, BlockLayer) and config.storage == "dense":
        return plain_linear(layer)
    if isinstance(layer, BlockLayer) or config.resolved().storage == "packed":
        return packed(layer, selected, mask, config)
    with torch.no_grad():
        layer.get_parameter("weight").mul_(_growth(layer, mask, config))
    return layer


def _growth(layer: nn.Module, mask: Tensor, config: SparsityConfig) -> float:
    """By how much to scale weights so that outputs begin as large as the dense layer's (equation 27 in docs/math.md).

    It is 1 / sqrt(density) for random weights of which random blocks live, and 1 for trained weights and for blocks that were
    chosen by their weights.
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    chosen = not config.spec.starts_sparse or first_init(layer, config) != "random"
    as_it_is = chosen or weight.is_meta or not mask.any() or _looks_trained(weight)
    return 1.0 if as_it_is else float(mask.float().mean()) ** -0.5


def factored(layer: Any, selected: Selected, mask: Tensor, config: SparsityConfig) -> KroneckerBlockLinear:
    """A Kronecker layer for a layer, initialised by the config. An existing one stays."""
    if isinstance(layer, KroneckerBlockLinear):
        if config.resolved().gate and layer.gate is None:
            layer.gate = nn.Parameter(torch.ones_like(layer.coeff[..., 0]))
            layer.enforce_zeros_()
        return layer
    init, weight = first_init(layer, config), layer.weight
    shape: dict[str, Any] = {"rank": selected.rank, "tile_groups": selected.tile_groups, "gate": config.resolved().gate}
    if init == "random" or weight.is_meta:
        new = KroneckerBlockLinear(
            layer.in_features,
            layer.out_features,
            selected.grid.block,
            bias=layer.bias is not None,
            device=weight.device,
            dtype=weight.dtype,
            **shape,
        )
    else:
        new = KroneckerBlockLinear.from_linear(layer, block_size=selected.grid.block, **shape)
    if not mask.all():
        new.set_block_mask_(mask.to(weight.device))
    if init != "nearest" and not weight.is_meta:
        new.match_variance_(weight)
    new.bias = layer.bias
    if config.rows is not None:
        new.choose_plan_(config.rows)
    for parameter in new.block_parameters():
        parameter.requires_grad_(is_trained(layer))
    return new.train(layer.training)


def packed(layer: nn.Module, selected: Selected, mask: Tensor, config: SparsityConfig) -> BlockSparseLinear:
    """A packed layer of a layer's live blocks. An existing one stays."""
    if isinstance(layer, BlockLayer):
        new = BlockSparseLinear.from_kron(layer) if isinstance(layer, KroneckerBlockLinear) else layer
        assert isinstance(new, BlockSparseLinear)
        mask = mask.to(new.block_mask.device)
        if not torch.equal(mask, new.block_mask):
            new.set_block_mask_(mask)
            new.compact_()
    else:
        assert isinstance(layer, nn.Linear)
        new = BlockSparseLinear.from_dense(layer, block_size=selected.grid.block, mask=mask)
        with torch.no_grad():
            new.values.mul_(_growth(layer, mask, config))
        new.bias = layer.bias
    new.values.requires_grad_(is_trained(layer))
    new.choose_plan_(config.rows)
    return new


@torch.no_grad()
def plain_linear(layer: BlockLayer) -> nn.Linear:
    """An nn.Linear with the weight of a block layer, zeros included, and its bias."""
    weight, bias = layer.dense_weight(), layer.bias
    assert bias is None or isinstance(bias, nn.Parameter)
    new = nn.Linear(layer.in_features, layer.out_features, bias=bias is not None, device="meta", dtype=weight.dtype)
    new.weight = nn.Parameter(weight, requires_grad=is_trained(layer))
    if bias is not None:
        new.bias = bias
    return new.train(layer.training)


def is_trained(layer: nn.Module) -> bool:
    """Whether the weight of an nn.Linear or block layer is trained, not frozen."""
    return any(p.requires_grad for name, p in layer.named_parameters(recurse=False) if name != "bias")


def present_masks(model: nn.Module, report: SurgeryReport, config: SparsityConfig) -> list[Tensor]:
    """The blocks of each selected layer that live now, (m1, n1) bool. All blocks of an nn.Linear live.

    Raises:
        KronblocksError: more are dead than the target allows, or a block layer has no weights yet.
    """
    masks = []
    for each in report.selected:
        layer = model.get_submodule(each.name)
        if isinstance(layer, BlockLayer) and not layer.block_mask.is_meta:
            masks.append(layer.block_mask.to("cpu", copy=True))
            continue
        if isinstance(layer, BlockLayer) and not (config.spec.is_factored and isinstance(layer, KroneckerBlockLinear)):
            raise KronblocksError(f"{each.name} is block-sparse already, on the meta device: load the model first")
        masks.append(torch.ones(each.grid.shape, dtype=torch.bool, device="cpu"))
    areas = [each.grid.block.area for each in report.selected]
    budgets = [range(len(masks))] if config.scope == "global" else [range(i, i + 1) for i in range(len(masks))]
    for layers in budgets:
        _check_target([report.selected[i].name for i in layers], [masks[i] for i in layers], [areas[i] for i in layers], config)
    return masks


def _check_target(names: list[str], masks: list[Tensor], areas: list[int], config: SparsityConfig) -> None:
    """Refuse a target below the present sparsity of the layers in one budget, with a margin for whole blocks."""
    dead = sum(int((~mask).sum()) * area for mask, area in zip(masks, areas, strict=True))
    total = sum(mask.numel() * area for mask, area in zip(masks, areas, strict=True))
    if total and dead - max(areas) >= config.target_sparsity * total * (1 - 1e-12):
        where = names[0] if len(names) == 1 else f"the selected layers ({some(names, 3)})"
        raise KronblocksError(
            f"{100 * dead / total:.1f}% of the weights of {where} are in dead blocks already, more than target_sparsity="
            f"{config.target_sparsity}, and no method revives blocks: raise it, or call densify_(model) first"
        )


def first_masks(
    model: nn.Module,
    report: SurgeryReport,
    config: SparsityConfig,
    present: Sequence[Tensor],
    heads: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """The blocks of each layer that live at first. Methods that start sparse keep as many as in the end, others all.

    Args:
        model: before layers are replaced.
        report: the selected layers.
        config: the user's settings.
        present: the blocks that live now, (m1, n1) bool.
        heads: names of the layers that make the output. None: not known yet, so no possible head gets an empty block row
            unless it must.
    """
    names = [each.name for each in report.selected]
    masks = list(present)
    if config.spec.starts_sparse:
        scores = [
            _first_scores(model.get_submodule(each.name), each, config).masked_fill(~live, -1.0)
            for each, live in zip(report.selected, present, strict=True)
        ]
        areas = [each.grid.block.area for each in report.selected]
        heads = possible_heads(model, names) if heads is None else heads
        is_head = [name in heads for name in names]
        strongest = strongest_masks(scores, areas, config.target_sparsity, config.resolved().distribution, is_head)
        masks = [mask & live for mask, live in zip(strongest, present, strict=True)]
    return dict(zip(names, masks, strict=True))


def _first_scores(layer: nn.Module, selected: Selected, config: SparsityConfig) -> Tensor:
    """Scores that decide which blocks live at first, (m1, n1), from 0 on."""
    if first_init(layer, config) == "random":
        return random_scores(selected.grid.shape)
    if next(layer.parameters(recurse=False)).is_meta:
        raise KronblocksError(
            "init='nearest' needs weights, but the model is on the meta device: load it first, or write init='random'"
        )
    if isinstance(layer, BlockLayer):
        return layer.block_norms().to("cpu")
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return selected.grid.norms(whole(weight.detach())).to("cpu")


def warn_of_blocks_of_zeros(model: nn.Module, report: SurgeryReport, config: SparsityConfig) -> None:
    """Warn of zero blocks in plain layers, perhaps from an earlier pruning: they count as live, and would train."""
    if config.spec.draws_start:
        return
    for each in report.selected:
        layer = model.get_submodule(each.name)
        if not isinstance(layer, nn.Linear) or layer.weight.is_meta:
            continue
        zero = each.grid.norms(whole(layer.weight.detach())) == 0
        if zero.any() and not zero.all():
            warnings.warn(
                f"{int(zero.sum())} of the {each.grid.blocks} blocks of {each.name} are exactly zero; in an nn.Linear they are "
                "live, and will train. To go on from an earlier pruning, keep its block layers: do not densify_ them, or get "
                "them by from_pretrained(save_pretrained(model, folder, sparsifier=...))",
                KronblocksWarning,
                stacklevel=4,
            )
            return


@torch.no_grad()
def relative_error(old: nn.Module, new: BlockLayer) -> float:
    """|W - new weight| / |W| in Frobenius norms, with the old layer's weight W."""
    weight = old.weight
    assert isinstance(weight, Tensor)
    weight = weight.double()
    total = float(torch.linalg.vector_norm(weight))
    return float(torch.linalg.vector_norm(weight - new.dense_weight().double())) / total if total else 0.0


def warn_of_dropped_weights(model: nn.Module, report: SurgeryReport, config: SparsityConfig) -> None:
    """Warn if weights that look trained would be replaced by random ones, and the user has not set `init`."""
    if not config.spec.draws_start or config.init is not None or config.resolved().init != "random":
        return
    for each in report.selected:
        layer = model.get_submodule(each.name)
        if isinstance(layer, nn.Linear) and _looks_trained(layer.weight):
            what = "replaces them by new factors" if config.spec.is_factored else "keeps random blocks of them"
            warnings.warn(
                f"the weight of {each.name} looks trained, and method {config.method!r} {what}: write "
                "SparsityConfig(init='nearest') to start from the present weights, or init='random' to start from new ones",
                KronblocksWarning,
                stacklevel=4,
            )
            return


@torch.no_grad()
def _looks_trained(weight: Tensor) -> bool:
    """Whether the largest singular value is far above that of independent random entries of the same variance.

    For these it is near sigma (sqrt(m) + sqrt(n)) in large matrices (Marchenko and Pastur, 1967). Small matrices count as
    untrained.
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
    """Warn if factors have as many numbers as the weights."""
    for each in report.selected:
        if each.rank >= each.grid.block.area:
            warnings.warn(
                f"rank {each.rank} in blocks of {each.grid.block} ({each.name}) trains as many factors as there are weights: "
                "use a lower rank or larger blocks",
                PerformanceWarning,
                stacklevel=4,
            )
            return
