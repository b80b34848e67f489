"""Products with factors. The factored plans are fused: their intermediate never reaches the device's memory.

"coeff_first" mixes input blocks and then applies tiles, "tile_first" the other way round. Backward has two forms as well, one for
each plan. Both give the exact gradient, and the one with fewer multiply-adds is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from kronblocks.ops.backends import torch as plain
from kronblocks.ops.backends.triton import sizes as suited
from kronblocks.ops.backends.triton import tuning
from kronblocks.ops.backends.triton.launch import arithmetic, cells, launch, padded, sum_dtype
from kronblocks.ops.backends.triton.roles import Roles
from kronblocks.ops.backends.triton.tuning import Sizes
from kronblocks.ops.backends.triton.weights import weight, weight_backward
from kronblocks.ops.plans import COEFF_FIRST, DENSE, Plan
from kronblocks.ops.precision import float32_products

Result = TypeVar("Result")


def kron_linear(x: Tensor, coeff: Tensor, tiles: Tensor, bias: Tensor | None, live: Tensor | None, plan: Plan) -> Tensor:
    """y = x W^T + bias; x (rows, n) -> (rows, m)."""
    if plan is DENSE:
        return linear(x, weight(coeff, tiles, live), bias)
    if not suited.fit_on_chip(tiles.shape[2:]):
        return plain.kron_linear(x, coeff, tiles, bias, live, plan)
    roles, bias = Roles.of(coeff, tiles, live), None if bias is None else bias.contiguous()
    return _mix_then_tile(roles, x, bias) if plan is COEFF_FIRST else _tile_then_mix(roles, x, bias)


def kron_backward(
    dy: Tensor, x: Tensor, coeff: Tensor, tiles: Tensor, live: Tensor | None, plan: Plan, input_grad: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """dx (rows, n) or None, dcoeff, exactly 0 for dead blocks, and dtiles; nothing is kept from the forward."""
    if plan is DENSE:
        dx = dy @ weight(coeff, tiles, live) if input_grad else None
        return dx, *weight_backward(dy.t() @ x, coeff, tiles, live)
    if not suited.fit_on_chip(tiles.shape[2:]):
        return plain.kron_backward(dy, x, coeff, tiles, live, plan, input_grad)
    forward = Roles.of(coeff, tiles, live)
    adjoint = forward.adjoint()
    if _backward_macs(forward, input_grad) < _backward_macs(adjoint, input_grad):
        dx = _tile_then_mix(adjoint, dy, None) if input_grad else None
        dtiles = _tiles_gradient(forward, x, dy)
        dcoeff = _coeff_gradient(adjoint, dy, x)
    else:
        dx, dtiles = _mix_then_tile_with_gradient(adjoint, dy, x) if input_grad else (None, _tiles_gradient(adjoint, dy, x))
        dcoeff = _coeff_gradient(forward, x, dy)
    dcoeff = dcoeff if live is None else dcoeff.where(live, 0)
    return dx, dcoeff.permute(1, 2, 0).to(coeff.dtype), dtiles.to(tiles.dtype)


def _backward_macs(roles: Roles, input_grad: bool) -> int:
    """Multiply-adds a row of the backward that mixes the sources of these roles to get the tiles' gradient."""
    mixtures = roles.outputs * (roles.banks if not roles.bank_of_output else 1)  # of a term
    mixing, tiling = roles.outputs * roles.sources * roles.tile_in, mixtures * roles.tile_in * roles.tile_out
    again = input_grad and (roles.bank_of_output or not _makes_both(roles))
    return (2 + again) * mixing + (2 + input_grad) * tiling


def _run(
    roles: Roles, kernel: str, x: Tensor, default: Sizes, run: Callable[[Sizes], Result], *, any_terms: bool = False
) -> Result:
    """Launch with the sizes that suit, or are known to be quickest.

    Args:
        roles: what to multiply with.
        kernel: its name.
        x: what it is launched for.
        default: the sizes that suit.
        run: the launch.
        any_terms: whether it may take any number of terms at a time.
    """
    about = {
        "rank": roles.rank,
        "groups": roles.banks,
        "grid": tuple(roles.planes.shape[1:]),
        "tile": tuple(roles.tiles.shape[2:]),
        "adjoint": not roles.bank_of_output,
        "live": roles.live is not None,
        "dtype": str(x.dtype),
        "precision": float32_products(),
    }
    return tuning.chosen(kernel, about, x, default, suited.others(roles, default, any_terms=any_terms), run)


def _split(rows: int, step: int, programs: int) -> tuple[int, int]:
    """Into how many parts a sum over rows is split where there are so many programs without that, and rows of a part."""
    splits = max(1, min(cells(rows, step), cells(suited.ENOUGH, programs)))
    share = max(1, cells(cells(rows, step), splits)) * step
    return cells(rows, share), share


def _listed(roles: Roles, sizes: Sizes) -> tuple[Tensor | None, Tensor | None]:
    """The input blocks that each chunk of output blocks is alive with, and how many."""
    from kronblocks.ops.backends.triton import fused_kernels as kernels

    if roles.live is None:
        return None, None
    places = roles.chunks(sizes), roles.own_banks
    sources = roles.planes.new_empty(*places, roles.sources_per_bank, dtype=torch.int32)
    counts = roles.planes.new_empty(places, dtype=torch.int32)
    launch(
        kernels.list_live, places, roles.live, sources, counts, *roles.strides,
        roles.outputs_per_bank, roles.chunks_per_bank(sizes), roles.sources_per_bank,
        BANK_OF_OUTPUT=roles.bank_of_output, BO=sizes.outputs, BK=64, num_warps=4,
    )  # fmt: skip
    return sources, counts


def _places(roles: Roles, sizes: Sizes) -> tuple[int, ...]:
    """Strides of terms, output and input blocks among the coefficients, and how chunks and banks are made."""
    grid = roles.planes.shape[1] * roles.planes.shape[2]
    return grid, *roles.strides, roles.outputs_per_bank, roles.chunks_per_bank(sizes), roles.sources_per_bank


def _known(roles: Roles, sizes: Sizes) -> dict[str, Any]:
    """What is known when compiling."""
    names = {"RANK": roles.rank, "BANKS": roles.own_banks, "C": roles.tile_out, "D": roles.tile_in}
    names |= {"BC": padded(roles.tile_out), "BD": padded(roles.tile_in), "SIDE": suited.side(roles)}
    names |= {"FLIPPED": not roles.bank_of_output, "LISTED": roles.live is not None, "BANK_OF_OUTPUT": roles.bank_of_output}
    return {**names, **sizes.settings(), **arithmetic(roles.tiles.dtype)}


def _mix_then_tile(roles: Roles, x: Tensor, bias: Tensor | None) -> Tensor:
    """y (rows, outputs) of x (rows, inputs)."""
    rows = x.shape[0]

    def run(sizes: Sizes) -> Tensor:
        y = x.new_empty(rows, roles.outputs * roles.tile_out)
        keeps = _keeps_factors(roles, sizes, roles.parts(sizes))
        share = _split(rows, sizes.rows, roles.chunks(sizes))[1] if keeps else sizes.rows
        _mix(roles, x, bias, None, y, None, sizes, share)
        return y

    return _run(roles, "mix_then_tile", x, suited.mixing(roles, rows, gradient=False), run, any_terms=True)


def _keeps_factors(roles: Roles, sizes: Sizes, parts: int) -> bool:
    """Whether a program that sums so many parts loads its coefficients and tiles once."""
    return parts == 1 and sizes.sources >= roles.sources_per_bank


def _makes_both(roles: Roles) -> bool:
    """Whether one program has all that y and the gradient of tiles are summed from."""
    return roles.own_banks == 1 and suited.mixed_terms(roles, gradient=True) >= roles.rank


def _mix_then_tile_with_gradient(roles: Roles, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """y and the tiles' gradient, if x is the gradient of their output and `other` their input, or the other way round."""
    if not _makes_both(roles):
        return _mix_then_tile(roles, x, None), _tiles_gradient(roles, x, other)

    def run(sizes: Sizes) -> tuple[Tensor, Tensor]:
        y = x.new_empty(x.shape[0], roles.outputs * roles.tile_out)
        return y, _mix_for_tiles(roles, x, other, y, sizes)

    return _run(roles, "mix_then_tile, both", x, suited.mixing(roles, x.shape[0], gradient=True), run)


def _tiles_gradient(roles: Roles, x: Tensor, other: Tensor) -> Tensor:
    """That gradient alone, in float32."""

    def run(sizes: Sizes) -> Tensor:
        return _mix_for_tiles(roles, x, other, None, sizes)

    return _run(roles, "mix_then_tile, gradient", x, suited.mixing(roles, x.shape[0], gradient=True), run, any_terms=True)


def _mix_for_tiles(roles: Roles, x: Tensor, other: Tensor, y: Tensor | None, sizes: Sizes) -> Tensor:
    rows, chunks, per_bank = x.shape[0], roles.chunks(sizes), roles.chunks_per_bank(sizes)
    splits, share = _split(rows, sizes.rows, chunks * roles.parts(sizes))
    spread, height, width = suited.spread(roles, sizes), padded(roles.tile_out), padded(roles.tile_in)
    shape = splits, chunks // per_bank, per_bank, roles.own_banks, roles.rank, spread, height, spread, width
    dtiles = x.new_empty(shape, dtype=sum_dtype(x))
    _mix(roles, x, None, other.contiguous(), y, dtiles, sizes, share)
    sums = dtiles.sum((0, 2)).flatten(0, 1).diagonal(0, 2, 4).sum(-1)[..., : roles.tile_out, : roles.tile_in]
    return sums if roles.bank_of_output else sums.transpose(2, 3)


def _mix(
    roles: Roles,
    x: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    y: Tensor | None,
    dtiles: Tensor | None,
    sizes: Sizes,
    share: int,
) -> None:
    from kronblocks.ops.backends.triton import fused_kernels as kernels

    x, rows, chunks, features = x.contiguous(), x.shape[0], roles.chunks(sizes), roles.outputs * roles.tile_out
    parts, programs = roles.parts(sizes), chunks * cells(rows, share)
    assert y is None or dtiles is None or parts == 1, "a program has the whole sum of y"
    apart = 1 if dtiles is None else parts  # have programs of their own
    launch(
        kernels.mix_then_tile, (programs * apart,),
        x, roles.planes, roles.tiles, bias, other, y, dtiles, *_listed(roles, sizes), rows, share,
        x.shape[1], features, features, *_places(roles, sizes), chunks, programs,
        HAS_BIAS=bias is not None, PRODUCT=y is not None, GRADIENT=dtiles is not None, PARTS=parts // apart, TERMS=sizes.terms,
        WHOLE=_keeps_factors(roles, sizes, parts // apart), SPREAD=suited.spread(roles, sizes), **_known(roles, sizes),
    )  # fmt: skip


def _tile_then_mix(roles: Roles, x: Tensor, bias: Tensor | None) -> Tensor:
    """y (rows, outputs) of x (rows, inputs)."""
    from kronblocks.ops.backends.triton import fused_kernels as kernels

    x, rows = x.contiguous(), x.shape[0]

    def run(sizes: Sizes) -> Tensor:
        y, chunks = x.new_empty(rows, roles.outputs * roles.tile_out), roles.chunks(sizes)
        launch(
            kernels.tile_then_mix, (chunks * cells(rows, sizes.rows),),
            x, roles.planes, roles.tiles, bias, y, *_listed(roles, sizes), rows, x.shape[1], y.shape[1],
            *_places(roles, sizes), chunks, HAS_BIAS=bias is not None, **_known(roles, sizes),
        )  # fmt: skip
        return y

    return _run(roles, "tile_then_mix", x, suited.tiling(roles, rows), run)


def _coeff_gradient(roles: Roles, x: Tensor, other: Tensor) -> Tensor:
    """(r, m1, n1) in float32: <other, tile x> of every output and input block; anything where a block is dead."""
    from kronblocks.ops.backends.triton import fused_kernels as kernels

    x, other, rows = x.contiguous(), other.contiguous(), x.shape[0]

    def run(sizes: Sizes) -> Tensor:
        chunks, parts = roles.chunks(sizes), roles.parts(sizes) * cells(roles.sources_per_bank, sizes.sources)
        splits, share = _split(rows, sizes.rows, chunks * parts)
        out = x.new_empty(splits, *roles.planes.shape, dtype=sum_dtype(x))
        launch(
            kernels.mix_gradient, (parts, chunks, splits),
            x, roles.tiles, other, out, *_listed(roles, sizes), rows, share, x.shape[1], other.shape[1],
            roles.planes.numel(), *_places(roles, sizes), TERMS=sizes.terms, **_known(roles, sizes),
        )  # fmt: skip
        return out.sum(0)

    return _run(roles, "mix_gradient", x, suited.pairing(roles), run, any_terms=True)
