"""Who computes: each module has the same functions of contiguous tensors, and `pick` says which one serves a tensor.

`packed_linear`, `packed_grad_input`, `packed_grad_values` multiply with packed blocks; `kron_linear` and `kron_backward` with
factors; `live_blocks` and `live_blocks_backward` build the packed blocks from factors.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor


def pick(tensor: Tensor) -> ModuleType:
    """The fastest backend for tensors of this device and dtype."""
    from kronblocks.ops.backends import native, torch, triton

    where = tensor.device.type, tensor.dtype
    return native if native.serves(*where) else triton if triton.serves(*where) else torch


def name(device: str, dtype) -> str:
    """The name of the backend that `pick` gives for a device type and dtype. Asking is no use: it warns of no fallback."""
    from kronblocks.ops.backends import library, native, triton

    if native.knows(device, dtype) and library.unavailable_reason() is None:
        return "native"
    return "triton" if triton.serves(device, dtype) else "torch"


def backend_key(device: str, dtype) -> str:
    """Name and build of the backend that `pick` gives: timings of another one do not count."""
    from kronblocks.ops.backends import native, triton

    found = name(device, dtype)
    builds = {"native": native.build, "triton": triton.build}
    return f"{found} {builds[found]()}" if found in builds else found
