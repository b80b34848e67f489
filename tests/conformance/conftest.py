"""The backends that the shared suite runs through. A new backend joins by its line in BACKENDS; the tests stay as they are."""

from typing import Any, NamedTuple

import pytest
import torch

from kronblocks.ops import packed
from kronblocks.ops.backends import torch as torch_backend
from kronblocks.ops.plans import PLANS


class Backend(NamedTuple):
    name: str
    packed: Any  # has packed_linear, packed_grad_input, packed_grad_values
    plans: dict[str, Any]  # has the factored plans: first, second, backward
    device: str
    dtypes: tuple[torch.dtype, ...]


BACKENDS = (Backend("torch", torch_backend, dict(PLANS), "cpu", (torch.float64, torch.float32, torch.bfloat16)),)


@pytest.fixture(params=BACKENDS, ids=lambda backend: backend.name)
def backend(request, monkeypatch) -> Backend:
    """The operators compute with this backend for the length of a test."""
    monkeypatch.setattr(packed, "backend", request.param.packed)
    for name, plan in request.param.plans.items():
        monkeypatch.setitem(PLANS, name, plan)
    return request.param


@pytest.fixture(params=(torch.float64, torch.float32, torch.bfloat16), ids=("fp64", "fp32", "bf16"))
def dtype(request, backend) -> torch.dtype:
    if request.param not in backend.dtypes:
        pytest.skip(f"{backend.name} does not compute in {request.param}")
    return request.param
