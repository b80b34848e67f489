"""Growth scores: the gradient that dead blocks would have, measured by hooks in the step before blocks are exchanged."""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kronblocks.core.blocks import BlockGrid
from kronblocks.core.hooks import OwnHook, forward_input


class GrowthProbe:
    """Measures the gradient that the dense weight would have, block by block, dead ones too (equation 19 in docs/math.md).

    It listens to one layer's input and output gradient, and sums over as many backward passes as there are before `read`; those
    that overflowed, whose step a `GradScaler` skips, are left out.
    """

    def __init__(self, module: nn.Module, grid: BlockGrid) -> None:
        self._grid, self._gradient = grid, None
        self._handle: RemovableHandle | None = module.register_forward_hook(OwnHook(self._forward), with_kwargs=True)

    def _forward(self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
        if not output.requires_grad:
            return
        x = forward_input(args, kwargs).detach()

        def add(dy: Tensor) -> None:
            gradient = dy.detach().reshape(-1, dy.shape[-1]).float().t() @ x.reshape(-1, x.shape[-1]).float()
            if torch.isfinite(gradient).all():
                self._gradient = gradient if self._gradient is None else self._gradient + gradient

        output.register_hook(add)

    def read(self) -> Tensor | None:
        """|dW block| / sqrt(area), (m1, n1), and stop listening; None where no backward pass went through the layer."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        if self._gradient is None:
            return None
        return self._grid.norms(self._gradient) / self._grid.block.area**0.5


class _Stance:
    """The stance of torch.compile, for the whole process: eager while anybody wants it, then what it was before."""

    def __init__(self) -> None:
        self._users = 0
        self._stance: Any = None

    def hold(self) -> None:
        if not self._users:
            self._stance = torch.compiler.set_stance("force_eager")
        self._users += 1

    def release(self) -> None:
        self._users -= 1
        if not self._users:
            self._stance.__exit__(None, None, None)


_STANCE = _Stance()


class EagerSteps:
    """Steps that compiled models run uncompiled, since what is compiled does not call the hooks that growth is measured by."""

    def __init__(self) -> None:
        self._release: Any = None

    def __reduce__(self) -> tuple[type[EagerSteps], tuple[()]]:  # a copy has begun none
        return EagerSteps, ()

    def begin(self) -> None:
        """From the next forward on, until `end`, or until nobody has this object any more."""
        if (self._release is None or not self._release.alive) and "torch._dynamo" in sys.modules:  # else nothing is compiled
            _STANCE.hold()
            self._release = weakref.finalize(self, _STANCE.release)

    def end(self) -> None:
        """As it was before."""
        if self._release is not None:
            self._release()
