"""`kron_linear`, `kron_weight`, `block_norms`: check the inputs once, look the plan up, call it."""

from __future__ import annotations

import torch
from torch import Tensor

from kronblocks.core.errors import KronblocksError
from kronblocks.ops import factored
from kronblocks.ops.index import BlockIndex
from kronblocks.ops.operands import autocast, check_factors, check_product
from kronblocks.ops.packed import checked_packed_linear
from kronblocks.ops.plans import dense, plan_named


def kron_weight(coeff: Tensor, tiles: Tensor) -> Tensor:
    """The weight W = sum_i A_i kron B_i, (m1*bm, n1*bn); differentiable (equation 1 in docs/math.md).

    Args:
        coeff: (m1, n1, r), multiplied by the gate if there is one.
        tiles: (g, r, bm, bn), g divides m1.

    Raises:
        KronblocksError: the shapes do not fit together.

    Source:
        Zhu, Zuo, Khalili, TMLR 2025, section 3.

    >>> kron_weight(torch.ones(2, 3, 1), torch.ones(1, 1, 4, 5)).shape
    torch.Size([8, 15])
    """
    check_factors(coeff, tiles)
    return dense.first(None, coeff, tiles)


def _packed(x: Tensor, coeff: Tensor, tiles: Tensor, bias: Tensor | None, live: Tensor | BlockIndex | None) -> Tensor:
    """The packed plan: build the live blocks, then multiply by them."""
    if live is None:
        raise KronblocksError('plan "packed" multiplies live blocks only: give live=, or use another plan')
    index = live if isinstance(live, BlockIndex) else BlockIndex.from_mask(live)
    if index.grid != coeff.shape[:2]:
        raise KronblocksError(f"live is for a grid of {index.grid}, but coeff is for {tuple(coeff.shape[:2])}")
    return checked_packed_linear(x, *packed_operands(coeff, tiles, index), bias)


def packed_operands(coeff: Tensor, tiles: Tensor, index: BlockIndex) -> tuple[Tensor, BlockIndex]:
    """The live blocks of W, (capacity, bm, bn), in the order of the index's entries, and the index with these as their slots."""
    values = factored.live_blocks(coeff, tiles, index)
    entries = torch.arange(len(index.slot), dtype=torch.int32, device=values.device)
    return values, index._replace(slot=entries)


def kron_linear(
    x: Tensor,
    coeff: Tensor,
    tiles: Tensor,
    bias: Tensor | None = None,
    *,
    plan: str,
    live: Tensor | BlockIndex | None = None,
) -> Tensor:
    """y = x W^T + bias with W = sum_i A_i kron B_i (equation 3 in docs/math.md).

    Args:
        x: (..., n1*bn).
        coeff: (m1, n1, r), multiplied by the gate if there is one.
        tiles: (g, r, bm, bn), g divides m1.
        bias: (m1*bm,) or None.
        plan: "dense", "tile_first", "coeff_first" or "packed"; `choose_plan` names the fastest.
        live: (m1, n1) bool, or its `BlockIndex`. Dead blocks count as zero, and gradients of their coefficients are exactly 0.
            None: full gradients. "packed" needs it.

    Returns:
        (..., m1*bm).

    Raises:
        KronblocksError: unknown plan, shapes, dtypes or devices that do not fit together, or "packed" without `live`.

    >>> x, coeff, tiles = torch.ones(7, 6), torch.ones(2, 3, 1), torch.ones(1, 1, 4, 2)
    >>> kron_linear(x, coeff, tiles, plan="coeff_first").shape
    torch.Size([7, 8])
    """
    check_factors(coeff, tiles)
    needs_live = plan_named(plan, coeff.shape[2]).needs_live
    (m1, n1, _), (_, _, bm, bn) = coeff.shape, tiles.shape
    if isinstance(live, Tensor) and (live.dtype != torch.bool or live.shape != coeff.shape[:2]):
        raise KronblocksError(f"live must be bool of shape ({m1}, {n1}), not {live.dtype} {tuple(live.shape)}")
    x, coeff, tiles, bias = autocast(x, coeff, tiles, bias)
    check_product(x, n1, bn, bias, m1 * bm, {"coeff": coeff, "tiles": tiles}, live.crow if isinstance(live, BlockIndex) else live)
    if needs_live:
        return _packed(x, coeff, tiles, bias, live)
    if live is not None and not isinstance(live, Tensor):
        raise KronblocksError(f'plan "{plan}" takes live as an (m1, n1) bool mask; a BlockIndex is for "packed"')
    return factored.kron_linear(x, coeff, tiles, bias, live, plan)


def block_norms(coeff: Tensor, tiles: Tensor) -> Tensor:
    """Frobenius norm of every block of W, (m1, n1), at least in fp32, without building W (equation 10 in docs/math.md).

    A QR of each group's flattened tiles gives R, and |R u| is the norm for the block's coefficients u. A Gram matrix would
    square the condition number, and cancel for nearly parallel tiles.

    Args:
        coeff: (m1, n1, r), multiplied by the gate if there is one.
        tiles: (g, r, bm, bn), g divides m1.
    """
    check_factors(coeff, tiles)
    dtype = torch.promote_types(coeff.dtype, torch.float32)
    groups, rank = tiles.shape[:2]
    factor = tiles.to(dtype).flatten(2).transpose(1, 2)  # (g, bm*bn, r)
    if rank < factor.shape[1]:
        factor = torch.linalg.qr(factor).R  # (g, r, r)
    mixed = coeff.to(dtype).reshape(groups, -1, rank) @ factor.transpose(1, 2)
    return torch.linalg.vector_norm(mixed, dim=-1).view(coeff.shape[:2])
