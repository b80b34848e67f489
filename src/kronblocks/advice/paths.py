"""Small layers in each way of computing, for the examination: right, and how fast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kronblocks.core.blocks import BlockGrid, BlockSize
from kronblocks.nn import BlockSparseLinear, KroneckerBlockLinear
from kronblocks.ops import reference
from kronblocks.ops.costs.timing import REFERENCE, measure
from kronblocks.ops.plans import PLAN_NAMES
from kronblocks.ops.precision import float32_products
from kronblocks.ops.problem import Problem

_BLOCK, _GRID, _RANK, _ROWS = (32, 32), (3, 4), 2, 45
_STORED = 4  # roundings to the dtype on the way to any result
_TF32 = 2.0**-9  # of two factors, cut after 10 bits each, in either stage
_SIZE, _LIVE = 1024, 0.1  # of the layers that are timed


@dataclass(frozen=True)
class Path:
    """A way of computing a layer.

    Args:
        name: of the plan, and of what a layer stores if it is not factors.
        make: a layer on a device, in a dtype.
        oracle: y from x and the layer's parameters by name.
    """

    name: str
    make: Callable[[str, torch.dtype], nn.Module]
    oracle: Callable[[Tensor, dict[str, Tensor], nn.Module], Tensor]

    def run(self, device: str, dtype: torch.dtype) -> tuple[nn.Module, list[Tensor], list[Tensor]]:
        """One step: the layer; x, dy and the parameters; y and the gradients of x and the parameters."""
        layer = self.make(device, dtype)
        generator = torch.Generator().manual_seed(1)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device="cpu").to(device, dtype)

        x, dy = random(_ROWS, _GRID[1] * _BLOCK[1]), random(_ROWS, _GRID[0] * _BLOCK[0])
        parameters = list(layer.parameters())
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            y = layer(x.requires_grad_())
            gradients = torch.autograd.grad(y, [x, *parameters], dy)
        return layer, [x, dy, *parameters], [y, *gradients]


def _mask() -> Tensor:
    """A dead block row, a dead block column, and others of both kinds."""
    p, q = torch.meshgrid(*(torch.arange(count, device="cpu") for count in _GRID), indexing="ij")
    return (p != 1) & (q != 2) & ((p + q) % 4 != 2)


def _factors(plan: str) -> Path:
    def make(device: str, dtype: torch.dtype) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layer = KroneckerBlockLinear(_GRID[1] * _BLOCK[1], _GRID[0] * _BLOCK[0], _BLOCK, rank=_RANK, plan=plan)
        layer = layer.to(device, dtype)
        layer.set_block_mask_(_mask().to(device))
        return layer

    def oracle(x: Tensor, given: dict[str, Tensor], layer: nn.Module) -> Tensor:
        return reference.kron_linear(x, given["coeff"], given["tiles"], given["bias"], live=_mask().to(x.device))

    return Path(plan, make, oracle)


def _values() -> Path:
    def make(device: str, dtype: torch.dtype) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layer = BlockSparseLinear(_GRID[1] * _BLOCK[1], _GRID[0] * _BLOCK[0], _BLOCK, mask=_mask(), plan="packed")
        return layer.to(device, dtype)

    def oracle(x: Tensor, given: dict[str, Tensor], layer: nn.Module) -> Tensor:
        places = [divmod(number, _GRID[1]) for number in _mask().flatten().nonzero().flatten().tolist()]
        return x @ reference.packed_weight(given["values"], places, _GRID).T + given["bias"]

    return Path("values packed", make, oracle)


PATHS = (*(_factors(plan) for plan in PLAN_NAMES), _values())
"""All of them."""


def difference(path: Path, device: str, dtype: torch.dtype) -> str:
    """What a step gets wrong beside the formulas in float64, "" if nothing.

    A sum of N products is within N eps of the exact one, times the same sum over absolute values (Higham 2002, section 3.1).
    """
    layer, given, found = path.run(device, dtype)
    names = ["x", *(name for name, _ in layer.named_parameters())]

    def by_formula(change: Callable[[Tensor], Tensor]) -> list[Tensor]:
        x, dy, *parameters = (change(each.detach().double()) for each in given)
        leaves = [each.requires_grad_() for each in (x, *parameters)]
        with torch.enable_grad():
            y = path.oracle(leaves[0], dict(zip(names[1:], leaves[1:], strict=True)), layer)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    exact, size = by_formula(Tensor.clone), by_formula(Tensor.abs)
    sums, stored = torch.finfo(torch.promote_types(dtype, torch.float32)).eps, torch.finfo(dtype).eps
    terms = _ROWS * max(*_GRID, *_BLOCK) + 2 * _BLOCK[0] * max(_GRID)
    cut = 2 * _TF32 if device != "cpu" and dtype == torch.float32 and float32_products() == "tf32" else 0.0
    labels = ("y", *(f"the gradient of {name}" for name in names))
    for label, own, wanted, most in zip(labels, found, exact, size, strict=True):
        wrong = ~((own.double() - wanted).abs() <= (terms * sums + _STORED * stored + cut) * most)
        if bool(wrong.any()):
            return f"{label} differs by {float((own.double() - wanted).abs()[wrong].max()):.3g}"
    return ""


def speeds(device: str) -> Iterator[tuple[str, float, float]]:
    """What was timed, seconds of a training step of a layer, and of a dense one beside it."""
    grid, rows = BlockGrid(_SIZE, _SIZE, BlockSize(*_BLOCK)), 256 if device == "cpu" else 4096
    for rank, density, words in ((2, 1.0, "all blocks live"), (None, _LIVE, f"{1 - _LIVE:.0%} zeros")):
        timed = measure(Problem(grid, rank, rows=rows, density=density, device=device))
        for plan, seconds in timed.items():
            if plan != REFERENCE and REFERENCE in timed:
                kind = "values" if rank is None else "factors"
                yield f"{kind} {plan}, {words}, {_SIZE}x{_SIZE}, {rows} rows", seconds, timed[REFERENCE]
