"""Who computes. A backend is a module that has what `Backend` lists:

- `name`; `serves`: for which devices and dtypes it computes here; `build`: of which version it is;
- the products: `packed_linear`, `packed_grad_input`, `packed_grad_values` with packed blocks; `kron_linear` and `kron_backward`
  with factors; `live_blocks` and `live_blocks_backward`, which build the packed blocks from factors;
- `wants_masks`: whether it is given masks in which no block is dead;
- what the cost model asks: `efficiency`, `keeps_on_chip`, `call_seconds`.

A new one joins by its line in `BACKENDS`, and by its line in tests/conformance/backends.py. Who serves a device and a dtype is
found once a process; `look_again` forgets it, for a process that changes `KRONBLOCKS_TRITON` after its first product.
"""

from __future__ import annotations

import functools

import torch as pytorch
from torch import Tensor

from kronblocks.ops.backends import native, triton
from kronblocks.ops.backends import torch as plain
from kronblocks.ops.backends.protocol import Backend

BACKENDS: tuple[Backend, ...] = (native, triton, plain)
"""The first one that serves a device and a dtype computes there; the last one always does."""


def pick(tensor: Tensor) -> Backend:
    """The fastest backend for tensors of this device and dtype. Warns, once, where it is not the one that it should be."""
    return _serving(tensor.device.type, tensor.dtype)


def expected(device: str, dtype: pytorch.dtype) -> Backend:
    """The backend that `pick` gives for a device and a dtype. Asking is no use: it warns of no fallback."""
    return _expected(device.split(":")[0], dtype)


def backend_key(device: str, dtype: pytorch.dtype) -> str:
    """Name and build of the backend that `pick` gives: timings of another one do not count."""
    backend = expected(device, dtype)
    return f"{backend.name} {backend.build()}".rstrip()


@functools.cache
def _serving(device_type: str, dtype: pytorch.dtype) -> Backend:
    return _first(device_type, dtype, warn=True)


@functools.cache
def _expected(device_type: str, dtype: pytorch.dtype) -> Backend:
    return _first(device_type, dtype, warn=False)


def _first(device_type: str, dtype: pytorch.dtype, *, warn: bool) -> Backend:
    return next(backend for backend in BACKENDS if backend.serves(device_type, dtype, warn=warn))


def look_again() -> None:
    """Find out again which backend serves: after `KRONBLOCKS_TRITON` has been changed in this process."""
    _serving.cache_clear()
    _expected.cache_clear()
