"""Growth scores: the gradients of dead blocks, measured by hooks in the step before blocks are exchanged."""

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
    """Measures the dense weight's gradient, block by block, dead blocks included (equation 19 in docs/math.md).

    It hooks one layer's input and output gradient, and sums over all backward passes before `read`. Passes that overflowed,
    so that a `GradScaler` skips their step, do not count.
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
        """Remove the hooks and return |dW block| / sqrt(area), (m1, n1); None if no backward pass reached the layer."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        if self._gradient is None:
            return None
        return self._grid.norms(self._gradient) / self._grid.block.area**0.5


class _Stance:
    """The process-wide stance of torch.compile: eager while any `EagerSteps` wants it, then as before."""

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
    """Make compiled models run uncompiled for some steps, since compiled code does not call the hooks of a probe."""

    def __init__(self) -> None:
        self._release: Any = None

    def __reduce__(self) -> tuple[type[EagerSteps], tuple[()]]:  # a copy has begun none
        return EagerSteps, ()

    def begin(self) -> None:
        """Run uncompiled from the next forward until `end`, or until this object is freed."""
        if (self._release is None or not self._release.alive) and "torch._dynamo" in sys.modules:  # else nothing is compiled
            _STANCE.hold()
            self._release = weakref.finalize(self, _STANCE.release)

    def end(self) -> None:
        """Run compiled again."""
        if self._release is not None:
            self._release()
