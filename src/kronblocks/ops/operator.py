"""Custom operators of ours, and the short way on which eager code calls them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _AutoDispatchBelowAutograd as below_autograd  # pyright: ignore[reportAttributeAccessIssue]
from torch._C import _get_tracing_state
from torch._C._functorch import peek_interpreter_stack  # pyright: ignore[reportMissingModuleSource]


def is_eager() -> bool:
    """Whether nobody traces what is called now, and torch.func is not at work."""
    return not torch.compiler.is_compiling() and peek_interpreter_stack() is None and _get_tracing_state() is None


class Operator:
    """`torch.ops.kronblocks.NAME`: opaque to torch.compile, with a fake rule and a rule for autograd.

    Torch keeps both rules for whoever traces it. Called eagerly, its rule for autograd costs 40 us a call, and 4 us where no
    gradient is wanted (measured). So a call goes past it: through a `torch.autograd.Function` with the same rule (8 us), or
    straight to the kernel.

    Args:
        name: NAME.
        compute: what computes on devices without a kernel in C++; its signature is the operator's.
        fake: makes empty outputs for fake inputs.
        save: what backward needs: (ctx, inputs, output) -> None.
        backward: (ctx, *gradients) -> a gradient or None for each input.
        differentiable: so many of the first inputs can have gradients.
    """

    def __init__(
        self,
        name: str,
        compute: Callable[..., Any],
        *,
        fake: Callable[..., Any],
        save: Callable[..., None],
        backward: Callable[..., Any],
        differentiable: int,
    ) -> None:
        definition = torch.library.custom_op(f"kronblocks::{name}", compute, mutates_args=())
        definition.register_fake(fake)
        definition.register_autograd(backward, setup_context=save)
        self.overload = overload = definition._opoverload
        self._call = overload._op  # without a Python frame in between
        self._differentiable = differentiable

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *inputs: Any) -> Any:
                save(ctx, inputs, None)
                with below_autograd():
                    return overload(*inputs)

        Function.backward = staticmethod(backward)
        self._function = Function

    def __call__(self, *inputs: Any) -> Any:
        """All inputs by place, defaults too."""
        return self.eager(*inputs) if is_eager() else self.overload(*inputs)

    def eager(self, *inputs: Any) -> Any:
        """The same where `is_eager`."""
        if torch.is_grad_enabled():
            for each in inputs[: self._differentiable]:
                if isinstance(each, Tensor) and each.requires_grad:
                    return self._function.apply(*inputs)
        if torch.is_inference_mode_enabled():  # which goes past autograd by itself
            return self._call(*inputs)
        with below_autograd():
            return self._call(*inputs)


def must_look() -> bool:
    """Whether an operator has to look at every call if its index is still true: in compiled code, where nobody else can."""
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting()


def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """The `save` of an operator whose inputs are tensors, all wanted in backward."""
    ctx.save_for_backward(*inputs)


def rows_of(x: Tensor) -> Tensor:
    """(..., features) -> (rows, features)."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
