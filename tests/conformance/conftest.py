"""The backends that the shared suite runs through. A new backend joins by its line in BACKENDS; the tests stay as they are."""

from typing import Any, NamedTuple

import pytest
import torch

from kronblocks.ops import backends
from kronblocks.ops.backends import library, native
from kronblocks.ops.backends import torch as torch_backend


class Backend(NamedTuple):
    name: str
    module: Any  # has the functions that `kronblocks.ops.backends` lists
    device: str
    dtypes: tuple[torch.dtype, ...]


BACKENDS = (
    Backend("torch", torch_backend, "cpu", (torch.float64, torch.float32, torch.bfloat16)),
    Backend("native", native, "cpu", (torch.float64, torch.float32)),
)


@pytest.fixture(params=BACKENDS, ids=lambda backend: backend.name)
def backend(request, monkeypatch) -> Backend:
    """The operators compute with this backend for the length of a test."""
    if request.param.module is native and library.unavailable_reason():
        pytest.skip(f"no native kernels: {library.unavailable_reason()}")
    monkeypatch.setattr(backends, "pick", lambda tensor: request.param.module)
    return request.param


@pytest.fixture(params=(torch.float64, torch.float32, torch.bfloat16), ids=("fp64", "fp32", "bf16"))
def dtype(request, backend) -> torch.dtype:
    if request.param not in backend.dtypes:
        pytest.skip(f"{backend.name} does not compute in {request.param}")
    return request.param
