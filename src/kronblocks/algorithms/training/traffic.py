"""What reaches a layer in a training step, as far as its speed depends on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kronblocks.core.hooks import Onlooker, OwnHook, forward_input, rows_of
from kronblocks.ops.operands import autocast_dtype


class Traffic(NamedTuple):
    """The input of a layer in a training step, as far as speed depends on it."""

    rows: int
    input_grad: bool
    dtype: str  # of the products; autocast's, if that is on
    size: tuple[int, int] | None = None  # height and width of the results of a convolution around the layer

    def values(self) -> list[Any]:
        """What `checked_traffic` takes; without a size outside of convolutions."""
        known = [self.rows, self.input_grad, self.dtype]
        return known if self.size is None else [*known, list(self.size)]


class Watch(Onlooker):
    """A forward pre-hook that notes the layer's input in the last training forward.

    It is no part of compiled code: there it notes the input while the code is compiled, in the first step.
    """

    def __init__(self, *, in_convolution: bool = False) -> None:
        self._in_convolution = in_convolution
        self.seen: tuple[tuple[int, ...], bool, torch.dtype] | None = None  # rows, as the input's shape has them
        self.compiled = False

        def while_compiling(context: Any) -> None:
            x = context.get_local("x").as_fake()
            rows = [size if isinstance(size, int) else size.node.hint for size in x.shape[:-1]]  # int(size) adds a guard
            if None not in rows:
                self.seen = tuple(rows), x.requires_grad, context.get_local("dtype").as_python_constant()
            self.compiled = True

        self._while_compiling = while_compiling

    def traffic(self) -> Traffic | None:
        """What it has seen, if it has."""
        if self.seen is None:
            return None
        rows, input_grad, dtype = self.seen
        size = (int(rows[1]), int(rows[2])) if self._in_convolution and len(rows) == 3 else None  # images, height, width
        return Traffic(int(math.prod(rows)), bool(input_grad), str(dtype).removeprefix("torch."), size)

    def __reduce__(self) -> tuple[type[OwnHook], tuple[()]]:  # a copy of the module is not looked at
        return OwnHook, ()

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        x = forward_input(args, kwargs)
        dtype = _product_dtype(x)
        if torch.compiler.is_compiling():
            from torch._dynamo.comptime import comptime  # slow to import; the compiler has imported it already

            comptime(self._while_compiling)
        else:
            self.seen = (rows_of(x),) if x.is_nested else tuple(x.shape[:-1]), x.requires_grad, dtype


def _product_dtype(x: Tensor) -> torch.dtype:
    cast = autocast_dtype(x.device.type)
    return x.dtype if cast is None or x.dtype == torch.float64 else cast


def checked_traffic(rows: int, input_grad: bool, dtype: str, size: Sequence[int] | None = None) -> Traffic:
    """Check the traffic of one layer; ValueError if it is something else."""
    known = isinstance(dtype, str) and isinstance(getattr(torch, dtype, None), torch.dtype)
    if not (known and _is_count(rows) and isinstance(input_grad, bool)):
        raise ValueError(f"{rows!r} rows, {input_grad!r}, {dtype!r}")
    if size is None:
        return Traffic(rows, input_grad, dtype)
    height, width = size
    if not (_is_count(height) and _is_count(width) and height * width > 0):
        raise ValueError(f"images of {size!r}")
    return Traffic(rows, input_grad, dtype, (height, width))


def _is_count(number: object) -> bool:
    return type(number) is int and 0 <= number < 2**63
