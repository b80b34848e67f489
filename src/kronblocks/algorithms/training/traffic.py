"""What reaches a layer in a training step, as far as its speed depends on it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kronblocks.core.hooks import OwnHook, forward_input, rows_of
from kronblocks.ops.operands import autocast_dtype


class Traffic(NamedTuple):
    """The input of a layer in a training step, as far as speed depends on it."""

    rows: int
    input_grad: bool
    dtype: str  # of the products; autocast's, if that is on


class Watch:
    """A forward pre-hook that notes the layer's input in the last training forward.

    It is no part of compiled code: there it notes the input while the code is compiled, in the first step.
    """

    def __init__(self) -> None:
        self.seen: tuple[int, bool, torch.dtype] | None = None
        self.compiled = False

        def while_compiling(context: Any) -> None:
            x = context.get_local("x").as_fake()
            rows = [size if isinstance(size, int) else size.node.hint for size in x.shape[:-1]]  # int(size) adds a guard
            if None not in rows:
                self.seen = math.prod(rows), x.requires_grad, context.get_local("dtype").as_python_constant()
            self.compiled = True

        self._while_compiling = while_compiling

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
            self.seen = rows_of(x), x.requires_grad, dtype


def _product_dtype(x: Tensor) -> torch.dtype:
    cast = autocast_dtype(x.device.type)
    return x.dtype if cast is None or x.dtype == torch.float64 else cast


def checked_traffic(rows: int, input_grad: bool, dtype: str) -> Traffic:
    """Check the traffic of one layer; ValueError if it is something else."""
    known = isinstance(dtype, str) and isinstance(getattr(torch, dtype, None), torch.dtype)
    if not (known and type(rows) is int and 0 <= rows < 2**63 and isinstance(input_grad, bool)):
        raise ValueError(f"{rows!r} rows, {input_grad!r}, {dtype!r}")
    return Traffic(rows, input_grad, dtype)
