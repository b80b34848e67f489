"""Optimiser parameter groups for sparse models, and what surgery does to an optimiser that is already running."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kronblocks.checks import number
from kronblocks.errors import KronblocksError
from kronblocks.nn.base import BlockLayer
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


_GROUPS = {"coeff": "coefficients", "gate": "coefficients", "tiles": "tiles", "values": LIFTED}


def replace_parameters_(optimizers: Sequence[Optimizer], old: BlockLayer, new: BlockLayer) -> None:
    """Let an optimiser go on with the parameters of the layer that has taken another's place; state and gradients are dropped.

    They join the groups that `parameter_groups` makes for them, or, where there are none, take the place of the first old one: in
    one optimiser, whichever of them held the old ones.
    """
    gone = {id(p) for p in old.block_parameters()}
    holders = [each for each in optimizers if any(id(p) in gone for group in each.param_groups for p in group["params"])]
    owner = next((each for each in holders if _group(each, LIFTED) is not None), holders[0] if holders else None)
    for optimizer in holders:
        if optimizer is owner:
            _put_in_place(optimizer, gone, new)
        drop_parameters_([optimizer], old.block_parameters())


def _group(optimizer: Optimizer, name: str) -> dict[str, Any] | None:
    return next((group for group in optimizer.param_groups if group.get("name") == name), None)


def _put_in_place(optimizer: Optimizer, gone: set[int], new: BlockLayer) -> None:
    home = next(group for group in optimizer.param_groups if any(id(p) in gone for p in group["params"]))
    place = next(place for place, p in enumerate(home["params"]) if id(p) in gone)
    has_momentum = "momentum_buffer" in optimizer.state.get(home["params"][place], {})
    layer = home["param_names"][place].rpartition(".")[0] if "param_names" in home else ""
    for name, p in new.named_parameters(recurse=False):
        if name not in _GROUPS:
            continue
        group = _group(optimizer, _GROUPS[name])
        if group is not None:
            _insert(group, len(group["params"]), p, f"{layer}.{name}")
            continue
        place += 1
        _insert(home, place, p, f"{layer}.{name}")
        if home.get("fused") and has_momentum:  # torch's fused SGD wants momenta of all parameters of a group, or of none
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)


def _insert(group: dict[str, Any], place: int, parameter: nn.Parameter, name: str) -> None:
    group["params"].insert(place, parameter)
    if "param_names" in group:  # of torch's named parameters
        group["param_names"].insert(place, name)


def _keep(group: dict[str, Any], kept: Sequence[int]) -> None:
    """Let a group go on with the parameters at these places."""
    for name in ("params", "param_names"):
        if name in group:
            group[name][:] = [group[name][place] for place in kept]


def in_order_of_(optimizers: Sequence[Optimizer], model: nn.Module) -> None:
    """Sort the groups of factors and of values as `parameter_groups` does: states are saved by place."""
    order = {id(p): place for place, p in enumerate(model.parameters())}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if group.get("name") in _GROUPS.values():
                places = [order.get(id(p), len(order)) for p in group["params"]]
                _keep(group, sorted(range(len(places)), key=places.__getitem__))


def drop_parameters_(optimizers: Sequence[Optimizer], gone: Sequence[Tensor]) -> None:
    """Let optimisers forget parameters that are no longer part of the model, and their state."""
    ids = {id(p) for p in gone}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            _keep(group, [place for place, p in enumerate(group["params"]) if id(p) not in ids])
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
