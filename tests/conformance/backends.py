"""The backends that the shared suite runs through. A new backend joins by its line in BACKENDS; the tests stay as they are."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from kronblocks.ops.backends import native, triton, whole
from kronblocks.ops.backends import torch as torch_backend


class Backend(NamedTuple):
    """What computes in a test.

    Args:
        module: has the functions that `kronblocks.ops.backends` lists.
        dtypes: what it computes in.
        needs: what it cannot run without (tests/needs.py).
        reduced: it is interpreted and slow, so it gets a part of each grid of cases, and no finite differences.
        block: a size of blocks that it multiplies as they are.
        builds: it multiplies by dead blocks too, as zeros of a weight that it builds.
    """

    name: str
    module: Any
    device: str
    dtypes: tuple[torch.dtype, ...]
    needs: str | None = None
    reduced: bool = False
    block: tuple[int, int] = (2, 3)
    builds: bool = False

    def parameter(self, *values: Any, name: Iterable[str] = ()) -> Any:
        """A case of a test whose first parameter is the backend."""
        marks = [pytest.mark.needs(self.needs)] if self.needs else []
        return pytest.param(self, *values, id="-".join((self.name, *name)), marks=marks)


_ELSEWHERE = SimpleNamespace(**vars(torch_backend))  # as it computes on other devices than a CPU
for product in ("packed_linear", "packed_grad_input", "packed_grad_values", "live_blocks", "live_blocks_backward"):
    setattr(_ELSEWHERE, product, getattr(whole, product))

BACKENDS = (
    Backend("torch", torch_backend, "cpu", (torch.float64, torch.float32, torch.bfloat16)),
    Backend("torch-whole", _ELSEWHERE, "cpu", (torch.float64, torch.bfloat16), reduced=True, builds=True),
    Backend("native", native, "cpu", (torch.float64, torch.float32, torch.bfloat16), needs="native"),
    # Triton's interpreter multiplies the bits of bfloat16; fp16 is in tests/ops/test_triton.py
    Backend("triton", triton, "cpu", (torch.float64, torch.float32), needs="triton", reduced=True, block=(16, 20)),
)
NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16"}


def over(whole: Iterable[tuple[Any, ...]], part: Iterable[tuple[Any, ...]] = ()) -> list[Any]:
    """Cases (backend, *values): each backend with the whole grid of values, or with a part of it if it is reduced."""
    whole, part = list(whole), list(part)
    return [
        backend.parameter(*values, name=map(str, values))
        for backend in BACKENDS
        for values in (part if backend.reduced else whole)
    ]


def in_dtypes(whole: Iterable[tuple[str, ...]], part: Iterable[tuple[str, ...]]) -> list[Any]:
    """Cases (backend, dtype, *values): those of `over`, in each dtype that the backend computes in."""
    whole, part = list(whole), list(part)
    return [
        backend.parameter(dtype, *values, name=(NAMES[dtype], *values))
        for backend in BACKENDS
        for dtype in backend.dtypes
        for values in (part if backend.reduced else whole)
    ]
