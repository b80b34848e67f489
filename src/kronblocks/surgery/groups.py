"""Optimiser parameter groups for sparse models."""

from __future__ import annotations

import itertools
from typing import Any

from torch import nn

from kronblocks.algorithms.rates import Rates
from kronblocks.algorithms.training.attachment import PART
from kronblocks.algorithms.training.rate_parts import RATES
from kronblocks.core.checks import number, one_of
from kronblocks.core.errors import KronblocksError
from kronblocks.nn.block_sparse_linear import BlockSparseLinear
from kronblocks.nn.kron_linear import KroneckerBlockLinear

FACTOR_LR_SCALE = 1.0
TILE_LR_SCALE = 1.0
LIFTED_LR_SCALE = 1.0
LIFTED = "lifted"
_calls = itertools.count()  # numbers the calls of parameter_groups, since the groups of one call belong together


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
    rates: Rates = "auto",
) -> list[dict[str, Any]]:
    """Parameter groups: "dense", "no-decay" (biases, norms), "coefficients", "tiles", and "lifted", empty until the lift.

    All five groups are always there, so that learning-rate schedules and resumed runs agree. For parts of a model with rates of
    their own, call this for each part and add the lists. Groups of one call share a number, "part", by which lifted values find
    their group.

    The rate and the decay are those of the dense model. While a sparsifier is attached, each of its layers steps at a multiple
    of them, which follows its density and its factors (equations 23 to 26 in docs/math.md). The groups do not show it;
    `sparsifier.learning_rates()` does.

    Args:
        model: after `sparsify_`.
        lr: learning rate, as for the dense model.
        weight_decay: of the group "dense", and of `values`; biases and one-dimensional parameters get none.
        factor_lr_scale: multiplies the rate of `coeff`, `tiles` and `gate`.
        tile_lr_scale: multiplies the rate of `tiles` further.
        lifted_lr_scale: multiplies the rate of `values`.
        factor_weight_decay: of `coeff`, `tiles` and `gate`.
        lifted_weight_decay: of `values`; None: `weight_decay`.
        keep_empty: False omits groups without parameters. Torch's distributed checkpoints refuse more than one of them.
        rates: "auto": multiples for the kind of the optimiser, or none if its steps have a scale of their own (LAMB, Muon,
            Prodigy). "adam" or "sgd": it is like these. "plain": no multiples, all layers step at `lr` times the scales above.

    >>> model = nn.Sequential(KroneckerBlockLinear(8, 6, 2, rank=1), nn.Linear(6, 3))
    >>> [(group["name"], len(group["params"])) for group in parameter_groups(model, lr=1e-3, weight_decay=0.1)]
    [('dense', 1), ('no-decay', 2), ('coefficients', 1), ('tiles', 1), ('lifted', 0)]
    """
    if not isinstance(model, nn.Module):
        raise KronblocksError(f"parameter_groups needs the model, not {type(model).__name__}")
    scales = {"factor_lr_scale": factor_lr_scale, "tile_lr_scale": tile_lr_scale, "lifted_lr_scale": lifted_lr_scale}
    for name, value in {"lr": lr, **scales}.items():
        number(name, value, 0, float("inf"), "a number from 0 on")
    one_of("rates", rates, Rates)
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
        (LIFTED, lifted, lifted_lr_scale, weight_decay if lifted_weight_decay is None else lifted_weight_decay),
    ]
    about = {PART: next(_calls)} if rates == "plain" else {PART: next(_calls), RATES: rates}
    return [
        {"params": [p for p in params if p.requires_grad], "lr": lr * scale, "weight_decay": decay, "name": name, **about}
        for name, params, scale, decay in groups
        if params or keep_empty
    ]
