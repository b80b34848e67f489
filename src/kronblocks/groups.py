"""Optimiser parameter groups for sparse models, and what surgery does to an optimiser that is already running."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kronblocks.checks import number
from kronblocks.errors import KronblocksError
from kronblocks.nn.block_sparse_linear import BlockSparseLinear
from kronblocks.nn.kron_linear import KroneckerBlockLinear

FACTOR_LR_SCALE = 1.0
TILE_LR_SCALE = 1.0
LIFTED_LR_SCALE = 1.5
LIFTED = "lifted"


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    factor_lr_scale: float = FACTOR_LR_SCALE,
    tile_lr_scale: float = TILE_LR_SCALE,
    lifted_lr_scale: float = LIFTED_LR_SCALE,
    factor_weight_decay: float = 0.0,
    lifted_weight_decay: float | None = None,
    keep_empty: bool = True,
) -> list[dict[str, Any]]:
    """Groups for an optimiser: "dense", "no-decay" (biases, norms), "coefficients", "tiles", and "lifted", empty till the lift.

    Give it the rate that suits the dense model; lifted values want a larger one (1.5 times by default; see the ablation in
    docs/experiments.md). All five groups are always there, so that learning-rate schedules and resumed runs agree.

    Args:
        model: after `sparsify_`.
        lr: learning rate of everything that is not sparse.
        weight_decay: of the group "dense"; biases and one-dimensional parameters get none.
        factor_lr_scale: rate of `coeff`, `tiles` and `gate`, relative to `lr`.
        tile_lr_scale: rate of `tiles`, relative to that of the other factors.
        lifted_lr_scale: rate of `values`, relative to `lr`.
        factor_weight_decay: of `coeff`, `tiles` and `gate`.
        lifted_weight_decay: of `values`; None: as factors.
        keep_empty: False leaves groups without parameters out: torch's distributed checkpoints refuse more than one of them.

    >>> model = nn.Sequential(KroneckerBlockLinear(8, 6, 2, rank=1), nn.Linear(6, 3))
    >>> [(group["name"], len(group["params"])) for group in parameter_groups(model, lr=1e-3, weight_decay=0.1)]
    [('dense', 1), ('no-decay', 2), ('coefficients', 1), ('tiles', 1), ('lifted', 0)]
    """
    if not isinstance(model, nn.Module):
        raise KronblocksError(f"parameter_groups wants the model, not {type(model).__name__}")
    scales = {"factor_lr_scale": factor_lr_scale, "tile_lr_scale": tile_lr_scale, "lifted_lr_scale": lifted_lr_scale}
    for name, value in {"lr": lr, **scales}.items():
        number(name, value, 0, float("inf"), "a number from 0 on")
    coefficients, tiles, lifted = [], [], []
    for module in model.modules():
        if isinstance(module, KroneckerBlockLinear):
            tiles.append(module.tiles)
            coefficients += [p for p in module.block_parameters() if p is not module.tiles]
        elif isinstance(module, BlockSparseLinear):
            lifted += module.block_parameters()
    taken = {id(p) for p in coefficients + tiles + lifted}
    rest = [p for p in model.parameters() if id(p) not in taken]
    groups = [
        ("dense", [p for p in rest if p.dim() > 1], 1.0, weight_decay),
        ("no-decay", [p for p in rest if p.dim() <= 1], 1.0, 0.0),
        ("coefficients", coefficients, factor_lr_scale, factor_weight_decay),
        ("tiles", tiles, factor_lr_scale * tile_lr_scale, factor_weight_decay),
        (LIFTED, lifted, lifted_lr_scale, factor_weight_decay if lifted_weight_decay is None else lifted_weight_decay),
    ]
    return [
        {"params": [p for p in params if p.requires_grad], "lr": lr * scale, "weight_decay": decay, "name": name}
        for name, params, scale, decay in groups
        if params or keep_empty
    ]


def replace_parameters_(optimizers: Sequence[Optimizer], old: Sequence[Tensor], new: nn.Parameter) -> None:
    """Let an optimiser go on with one new parameter for several old ones, whose state and gradients are dropped.

    It joins the group named "lifted", or, where there is none, takes the place of the first old one: in one optimiser, whichever
    of them held the old ones.
    """
    gone = {id(p) for p in old}
    holders = [each for each in optimizers if any(id(p) in gone for group in each.param_groups for p in group["params"])]
    owner = next((each for each in holders if _lifted_group(each) is not None), holders[0] if holders else None)
    for optimizer in holders:
        if optimizer is owner:
            _add_in_place(optimizer, gone, new)
        drop_parameters_([optimizer], old)


def _lifted_group(optimizer: Optimizer) -> dict[str, Any] | None:
    return next((group for group in optimizer.param_groups if group.get("name") == LIFTED), None)


def _add_in_place(optimizer: Optimizer, gone: set[int], new: nn.Parameter) -> None:
    lifted = _lifted_group(optimizer)
    if lifted is not None:
        lifted["params"].append(new)
        return
    home = next(group for group in optimizer.param_groups if any(id(p) in gone for p in group["params"]))
    first = next(place for place, p in enumerate(home["params"]) if id(p) in gone)
    has_momentum = "momentum_buffer" in optimizer.state.get(home["params"][first], {})
    home["params"][first] = new
    if home.get("fused") and has_momentum:  # torch's fused SGD wants momenta of all parameters of a group, or of none
        optimizer.state[new]["momentum_buffer"] = torch.zeros_like(new)


def drop_parameters_(optimizers: Sequence[Optimizer], gone: Sequence[Tensor]) -> None:
    """Let optimisers forget parameters that are no longer part of the model, and their state."""
    ids = {id(p) for p in gone}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"][:] = [p for p in group["params"] if id(p) not in ids]
        for p in gone:
            optimizer.state.pop(p, None)
    for p in gone:
        p.grad = None  # whoever kept a list of parameters would count it in norms


def keep_slots_(optimizers: Sequence[Optimizer], old: nn.Parameter, new: nn.Parameter, kept: Tensor) -> None:
    """Let an optimiser go on with compacted values: they take the old ones' place, and state with a row a slot keeps its rows.

    Args:
        optimizers: those that may hold the parameter.
        old: (capacity, bm, bn), the values before `compact_`.
        new: (new capacity, bm, bn), the values after it.
        kept: (new capacity,) the slots that were kept.
    """
    old.grad = None
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"][:] = [new if p is old else p for p in group["params"]]
        state = optimizer.state.pop(old, None)
        if state is None:
            continue
        optimizer.state[new] = state
        for name, value in state.items():
            if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == old.shape[0]:
                state[name] = value.index_select(0, kept.to(value.device))
            elif isinstance(value, Tensor) and value.numel() > 1:
                raise KronblocksError(
                    f"the optimiser keeps {name!r} of shape {tuple(value.shape)} for block values, which has no row a slot: "
                    "use an optimiser whose state has the shape of its parameters, such as AdamW or SGD"
                )


def optimizer_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors in an optimiser's state."""
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
