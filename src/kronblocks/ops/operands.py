"""Check the operands of products (shapes, dtypes, devices), and cast them under autocast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from kronblocks.core.errors import KronblocksError


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype of products under autocast on a device type; None if it is off."""
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def check_tensor(x: Any) -> None:
    """Raise KronblocksError for an input that is not a tensor. Proxies of torch.fx are accepted."""
    if not isinstance(x, Tensor) and not isinstance(x, fx.Proxy):
        raise KronblocksError(
            f"the input must be a tensor, not {type(x).__name__}: write torch.as_tensor(x, dtype=..., device=...) with the "
            "dtype and the device of the layer's parameters"
        )


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """Cast tensors to autocast's dtype on the first one's device; unchanged if autocast is off.

    Raises:
        KronblocksError: the first one is not a tensor.
    """
    check_tensor(tensors[0])
    dtype = autocast_dtype(tensors[0].device.type)
    if dtype is None:
        return tensors
    return tuple(t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def check_factors(coeff: Tensor, tiles: Tensor) -> None:
    """Refuse coefficients and tiles that do not fit together."""
    if coeff.dim() != 3 or tiles.dim() != 4:
        raise KronblocksError(
            f"coeff must be (m1, n1, r) and tiles (g, r, bm, bn), not {tuple(coeff.shape)} and {tuple(tiles.shape)}"
        )
    if coeff.shape[2] != tiles.shape[1]:
        raise KronblocksError(f"coeff has rank {coeff.shape[2]}, but tiles have rank {tiles.shape[1]}")
    if coeff.device != tiles.device:
        raise KronblocksError(f"coeff is on {coeff.device}, but tiles on {tiles.device}: move one with .to(device)")
    if tiles.shape[0] < 1 or coeff.shape[0] % tiles.shape[0]:
        raise KronblocksError(f"{tiles.shape[0]} groups of tiles do not divide {coeff.shape[0]} block rows: choose a divisor")


def check_product(
    x: Tensor,
    columns: int,
    width: int,
    bias: Tensor | None,
    out_features: int,
    weights: dict[str, Tensor],
    where: Tensor | None,
    *,
    one_dtype: bool = True,
) -> None:
    """Refuse an x or a bias that does not fit the weights, in shape, dtype or device.

    Args:
        x: (..., columns * width).
        columns: number of block columns.
        width: columns of a block.
        bias: (out_features,) or None.
        out_features: rows of the weight.
        weights: tensors of the weight, by name.
        where: a tensor of the mask or index, if there is one.
        one_dtype: whether all must have the dtype of x.
    """
    shape = x.shape
    features = shape[-1] if shape else 0
    if features != columns * width:
        raise KronblocksError(f"x has {features} features, but {columns} block columns of {width} need {columns * width}")
    if bias is not None and bias.shape != (out_features,):
        raise KronblocksError(f"bias must be ({out_features},), not {tuple(bias.shape)}")
    dtype, device = x.dtype, x.device
    if where is not None and where.device != device:
        raise _devices_differ(device, {**weights, "block_mask": where})
    for tensor in weights.values() if bias is None else (*weights.values(), bias):
        if one_dtype and tensor.dtype != dtype:
            found = ", ".join(f"{name} {t.dtype}" for name, t in {**weights, "bias": bias}.items() if t is not None)
            raise KronblocksError(
                f"x is {dtype}, but {found}: convert the model or the input with .to(dtype), or use torch.autocast"
            )
        if tensor.device != device:
            raise _devices_differ(device, {**weights, "bias": bias})


def _devices_differ(device: torch.device, others: dict[str, Tensor | None]) -> KronblocksError:
    elsewhere = {name: t.device for name, t in others.items() if t is not None and t.device != device}
    empty = [name for name, place in elsewhere.items() if place.type == "meta"]
    if empty:
        return KronblocksError(
            f"{', '.join(empty)} of the layer has no values yet (meta device): load a state_dict with assign=True, or call "
            "to_empty(device=...) and then load one"
        )
    found = ", ".join(f"{name} on {place}" for name, place in elsewhere.items())
    return KronblocksError(f"x is on {device}, but {found}: move the model or the input with .to(device)")
