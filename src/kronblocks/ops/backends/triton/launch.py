"""What all launches share: the kernels by name, sizes, and the arithmetic of products."""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

import torch
from torch import Tensor

PROGRAMS = 512
"""Programs that fill a GPU: sums over rows are split until there are as many."""


@functools.cache
def _kernel(name: str) -> Any:
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what it does anyway; unset it warns
    for module in ("packed_kernels", "fused_kernels", "weights_kernels"):
        found = getattr(importlib.import_module(f"kronblocks.ops.backends.triton.{module}"), name, None)
        if found is not None:
            return found
    raise AttributeError(name)


def launch(name: str, programs: tuple[int, ...], *arguments: Any, **settings: Any) -> None:
    """Run a kernel; nothing where there are no programs."""
    if all(programs):
        _kernel(name)[programs](*arguments, **settings)


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
    """How products are taken and summed: in float32 as precisely as torch.get_float32_matmul_precision says. "highest" takes
    three products of TF32, which together are as good as one of float32.
    """
    import triton.language as tl

    total = tl.float64 if dtype == torch.float64 else tl.float32
    precise = dtype == torch.float64 or torch.get_float32_matmul_precision() == "highest"
    return {"PRECISION": ("ieee" if dtype == torch.float64 else "tf32x3") if precise else "tf32", "SUM": total}
