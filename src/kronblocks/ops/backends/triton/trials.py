"""Small problems whose results a kernel must get right before it serves: beside float64 on the same device.

Some block rows and columns are dead, slots are in an order of their own with spare ones among them, and rows do not fill a
program. Operands are normal random numbers, so a sum of products is about as large as the root of the sum of their squares, the
"noise". Each of N additions errs by eps of a partial sum, which is rarely above 4 times the noise; so the sum errs by 4 N eps of
it at most (tensor cores cut what others round). What is rounded before it is summed adds 4 times its own relative error. Where
the noise is 0, as in dead blocks, only an exact 0 passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from kronblocks.ops.backends import whole
from kronblocks.ops.backends.triton import fused, packed, weights
from kronblocks.ops.backends.triton.roles import Roles
from kronblocks.ops.backends.triton.trust import Unit
from kronblocks.ops.index import BlockIndex
from kronblocks.ops.plans import dense

ROWS = (2100, 37)  # the first ones are summed in parts
_GRIDS = ((6, 5), (2, 3))  # their block rows have two banks of tiles
_SPARE, _PARTS = 2, 8  # slots of dead blocks; roundings of a product in parts, and of what joins sums
_LARGE = 4.0  # times the noise: what a partial sum hardly exceeds
_TF32 = 2.0**-9  # of two factors, cut after 10 bits each


@dataclass
class Trial:
    """Operands of one small problem."""

    x: Tensor  # (rows, n1*bn)
    dy: Tensor  # (rows, m1*bm)
    bias: Tensor | None
    coeff: Tensor  # (m1, n1, r)
    tiles: Tensor  # (g, r, bm, bn)
    values: Tensor  # (capacity, bm, bn)
    mask: Tensor  # (m1, n1) bool
    index: BlockIndex
    live: Tensor | None  # the mask, where the unit has one

    def exact(self, *, squared: bool = False) -> Trial:
        """The same in float64; or the squares of all operands, whose sums of products are those of squared products."""

        def change(tensor: Tensor) -> Tensor:
            return tensor.double().square() if squared else tensor.double()

        bias = None if self.bias is None else change(self.bias)
        x, dy, coeff, tiles, values = map(change, (self.x, self.dy, self.coeff, self.tiles, self.values))
        return Trial(x, dy, bias, coeff, tiles, values, self.mask, self.index, self.live)

    def alive(self) -> Tensor:
        """The coefficients, 0 for dead blocks."""
        return self.coeff if self.live is None else self.coeff.masked_fill(~self.live.unsqueeze(-1), 0)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """dx, dcoeff and dtiles of the factored product."""
        alive = self.alive()
        dx, dcoeff, dtiles = dense.backward(self.dy, self.x, alive, self.tiles, dense.first(None, alive, self.tiles), True)
        assert dx is not None
        return dx, dcoeff if self.live is None else dcoeff.masked_fill(~self.live.unsqueeze(-1), 0), dtiles


def trials(unit: Unit, device: torch.device) -> Iterator[Trial]:
    """The problems of a unit."""
    bm, bn = unit.block
    for number, ((m1, n1), rows) in enumerate(zip(_GRIDS, ROWS, strict=True)):
        generator = torch.Generator(device).manual_seed(number)

        def random(*shape: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(shape, device=device, generator=generator).to(unit.dtype)

        p, q = torch.meshgrid(torch.arange(m1, device=device), torch.arange(n1, device=device), indexing="ij")
        mask = (p != 1) & (q != n1 - 2) & ((p + 2 * q) % 3 != 1)
        if number:
            mask = (p == 0) & (q == n1 - 1)
        alive, dead = mask.flatten().nonzero().squeeze(1), (~mask).flatten().nonzero().squeeze(1)[:_SPARE]
        position = torch.cat([alive, dead])
        position = position[torch.randperm(len(position), device=device, generator=generator)]
        rank = max(1, unit.rank)
        yield Trial(
            x=random(rows, n1 * bn),
            dy=random(rows, m1 * bm),
            bias=None if number else random(m1 * bm),
            coeff=random(m1, n1, rank),
            tiles=random(2 if unit.several else 1, rank, bm, bn),
            values=random(len(position), bm, bn),
            mask=mask,
            index=BlockIndex.from_mask(mask, position),
            live=mask if unit.masked else None,
        )


def _roles(trial: Trial, unit: Unit) -> tuple[Roles, Tensor, Tensor]:
    roles = Roles.of(trial.coeff, trial.tiles, trial.live)
    return (roles.adjoint(), trial.dy, trial.x) if unit.adjoint else (roles, trial.x, trial.dy)


def _own(unit: Unit, trial: Trial) -> dict[str, Tensor]:
    """What the kernel computes, by name."""
    x, dy, values, index, coeff, tiles, live = (
        getattr(trial, name) for name in ("x", "dy", "values", "index", "coeff", "tiles", "live")
    )
    match unit.kernel:
        case "product":
            return {"y": packed.packed_linear(x, values, index, trial.bias)}
        case "product, transposed":
            return {"dx": packed.packed_grad_input(dy, values, index)}
        case "grad_values":
            return {"dvalues": packed.packed_grad_values(dy, x, index)}
        case "copy":
            copied = weights.gather(whole.weight(values, index), index, *unit.block)
            return {"W": weights.scatter(values, index), "blocks of W": copied}
        case "blocks":
            return {"blocks": weights.live_blocks(coeff, tiles, index)}
        case "blocks, whole":
            return {"W": weights.weight(coeff, tiles, live)}
        case "gradients of blocks":
            return dict(zip(("dcoeff", "dtiles"), weights.live_blocks_backward(values, coeff, tiles, index), strict=True))
        case "gradients of blocks, whole":
            gradients = weights.weight_backward(dy.t() @ x, coeff, tiles, live)
            return dict(zip(("dcoeff", "dtiles"), gradients, strict=True))
    roles, given, other = _roles(trial, unit)
    product = "dx" if unit.adjoint else "y"
    match unit.kernel:
        case "mix_then_tile":
            return {product: fused._mix_then_tile(roles, given, None if unit.adjoint else trial.bias)}
        case "tile_then_mix":
            return {product: fused._tile_then_mix(roles, given, None if unit.adjoint else trial.bias)}
        case "mix_then_tile, both":
            return dict(zip((product, "dtiles"), fused._mix_then_tile_with_gradient(roles, given, other), strict=True))
        case "mix_then_tile, gradient":
            return {"dtiles": fused._tiles_gradient(roles, given, other)}
        case "mix_gradient":
            dcoeff = fused._coeff_gradient(roles, given, other).permute(1, 2, 0)
            return {"dcoeff": dcoeff if live is None else dcoeff.where(live.unsqueeze(-1), 0)}
    raise AssertionError(f"no trial of {unit}")


def _wanted(unit: Unit, trial: Trial) -> dict[str, Tensor]:
    """The same by plain PyTorch: sums of products, all of them."""
    x, dy, values, index, coeff, tiles = trial.x, trial.dy, trial.values, trial.index, trial.coeff, trial.tiles
    if unit.kernel in ("product", "product, transposed", "grad_values", "copy"):
        weight = whole.weight(values, index)
        listed = whole.packed_grad_values(*_identity(weight), index) if unit.kernel == "copy" else weight
        return {
            "y": torch.nn.functional.linear(x, weight, trial.bias),
            "dx": dy @ weight,
            "dvalues": whole.packed_grad_values(dy, x, index),
            "W": weight,
            "blocks of W": listed,
        }
    if unit.kernel == "blocks":
        return {"blocks": whole.live_blocks(coeff, tiles, index)}
    if unit.kernel == "gradients of blocks":
        return dict(zip(("dcoeff", "dtiles"), whole.live_blocks_backward(values, coeff, tiles, index), strict=True))
    weight = dense.first(None, trial.alive(), tiles)
    dx, dcoeff, dtiles = trial.gradients()
    y = torch.nn.functional.linear(x, weight, trial.bias)
    return {"y": y, "dx": dx, "dcoeff": dcoeff, "dtiles": dtiles, "W": weight}


def _identity(weight: Tensor) -> tuple[Tensor, Tensor]:
    """dy and x with dy^T x = W."""
    return weight.t().contiguous(), torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)


def _terms(unit: Unit, trial: Trial, name: str) -> int:
    """Additions on the way to an output: those of both stages of a factored product."""
    (rows, n), m, (bm, bn) = trial.x.shape, trial.dy.shape[1], unit.block
    match name:
        case "y":
            return n * (1 + unit.rank)
        case "dx":
            return m * (1 + unit.rank)
        case "dvalues":
            return rows
        case "dcoeff":
            return rows * max(bm, bn) + bm * bn
        case "dtiles":
            return rows * max(trial.mask.shape) + trial.mask.numel()
    return 1 + unit.rank  # blocks or W


def _bound(unit: Unit, additions: int, own: Tensor, exact: Tensor, noise: Tensor) -> Tensor:
    """How far rounding may lead: of sums, of intermediates in the dtype, of factors in TF32, and of the result."""
    sums = torch.finfo(torch.promote_types(unit.dtype, torch.float32)).eps
    stages = 2 if unit.rank else 1
    cut = _TF32 * stages if unit.dtype == torch.float32 and unit.precision == "tf32" else 0.0
    stored = torch.finfo(unit.dtype).eps * (stages - 1)
    return _LARGE * ((additions + _PARTS) * sums + cut + stored) * noise + (cut + torch.finfo(own.dtype).eps) * exact.abs()


def differences(unit: Unit, device: torch.device) -> tuple[str, bool]:
    """What a kernel gets wrong in its trials, "" if nothing, and whether the next process would find the same.

    Random numbers, modes and autocast of the caller stay as they are.
    """
    from triton.runtime.errors import OutOfResources

    off = torch.autocast(device.type, enabled=False)
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad(), off:
        for trial in trials(unit, device):
            exact, squares = _wanted(unit, trial.exact()), _wanted(unit, trial.exact(squared=True))
            try:
                found = _own(unit, trial)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
            except torch.OutOfMemoryError:
                return "the GPU's memory was too full for a check", False
            except OutOfResources as error:
                return f"it does not fit: {_first_line(error)}", True
            except Exception as error:  # of the compiler, of its tools, or of the GPU: all mean that it cannot serve
                return f"it failed with {type(error).__name__}: {_first_line(error)}", True
            for name, own in found.items():
                error = (own.double() - exact[name]).abs()
                bound = _bound(unit, _terms(unit, trial, name), own, exact[name], squares[name].sqrt())
                wrong = ~(error <= bound)
                if bool(wrong.any()):
                    worst = float(error[wrong].max())
                    return f"{name} differs from float64 by {worst:.3g}, rounding explains {float(bound[wrong].max()):.3g}", True
    return "", True


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no words"])[0][:200]
