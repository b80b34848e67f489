"""What all launches share: the device, sizes, and the arithmetic of products.

Launching functions import their kernels where they launch them: Triton need not be installed.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from kronblocks.ops.precision import float32_products

PROGRAMS = 512
"""Programs that fill a GPU: sums over rows are split until there are as many."""


def launch(kernel: Any, programs: tuple[int, ...], *arguments: Any, **settings: Any) -> None:
    """Run a kernel on the device of its tensors; nothing where there are no programs."""
    if all(programs):
        _say_what_is_default()
        with on_device_of(arguments):
            kernel[programs](*arguments, **settings)


@functools.cache
def _say_what_is_default() -> None:
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what Triton does anyway; unset it warns


def on_device_of(arguments: Iterable[Any]) -> contextlib.AbstractContextManager[object]:
    """Make the GPU that holds the first tensor the current one: Triton launches there, and on its stream."""
    device = next(each.device for each in arguments if isinstance(each, Tensor))
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def padded(size: int, least: int = 1) -> int:
    """The power of two from a size on."""
    return max(least, 1 << (size - 1).bit_length())


def cells(count: int, size: int) -> int:
    """How many parts of a size hold so many."""
    return -(-count // size)


def sum_dtype(tensor: Tensor) -> torch.dtype:
    """In which sums over a tensor's values are taken."""
    return torch.promote_types(tensor.dtype, torch.float32)


def arithmetic(dtype: torch.dtype) -> dict[str, Any]:
    """How products are taken and summed: of float32 in TF32 where torch may do that too, else by three products of TF32, which
    together are about as good as one of float32.
    """
    import triton.language as tl

    total = tl.float64 if dtype == torch.float64 else tl.float32
    precise = {"ieee": "tf32x3", "tf32": "tf32"}[float32_products()]
    return {"PRECISION": "ieee" if dtype == torch.float64 else precise, "SUM": total}
