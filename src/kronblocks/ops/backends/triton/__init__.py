"""Kernels for NVIDIA GPUs, written in Triton: float32, float16 and bfloat16 with sums in float32 (float64 in its interpreter).

`packed.py` multiplies by live blocks, `fused.py` by factors, and `weights.py` builds blocks or W from factors. Each launches the
kernels of its `*_kernels` module. There are no atomic additions, so results are the same from run to run.

Each kernel is checked on the device before it serves there (`trust.py`). One that is refused leaves its products to PyTorch.

With TRITON_INTERPRET=1, set before the kernels are loaded, they run on a CPU. Tests without a GPU do that.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from kronblocks.ops.backends import torch as plain
from kronblocks.ops.backends.triton import fused, packed, trust, weights
from kronblocks.ops.backends.triton.estimate import call_seconds, efficiency, keeps_on_chip
from kronblocks.ops.plans import DENSE, Plan

__all__ = [
    "build",
    "call_seconds",
    "efficiency",
    "is_installed",
    "keeps_on_chip",
    "kron_backward",
    "kron_linear",
    "live_blocks",
    "live_blocks_backward",
    "name",
    "packed_grad_input",
    "packed_grad_values",
    "packed_linear",
    "serves",
    "wants_masks",
]

name = "triton"
wants_masks = False  # where no block is dead they read no mask and list no blocks

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _built_linear(x: Tensor, coeff: Tensor, tiles: Tensor, bias: Tensor | None, live: Tensor | None, plan: Plan) -> Tensor:
    """What computes in place of a refused kernel: plans were chosen since theirs keep no intermediate, which einsums do."""
    return plain.kron_linear(x, coeff, tiles, bias, live, DENSE)


def _built_backward(
    dy: Tensor, x: Tensor, coeff: Tensor, tiles: Tensor, live: Tensor | None, plan: Plan, input_grad: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    return plain.kron_backward(dy, x, coeff, tiles, live, DENSE, input_grad)


packed_linear = trust.or_plain(packed.packed_linear, plain.packed_linear)
packed_grad_input = trust.or_plain(packed.packed_grad_input, plain.packed_grad_input)
packed_grad_values = trust.or_plain(packed.packed_grad_values, plain.packed_grad_values)
kron_linear = trust.or_plain(fused.kron_linear, _built_linear)
kron_backward = trust.or_plain(fused.kron_backward, _built_backward)
live_blocks = trust.or_plain(weights.live_blocks, plain.live_blocks)
live_blocks_backward = trust.or_plain(weights.live_blocks_backward, plain.live_blocks_backward)


@functools.cache
def is_installed() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def serves(device: str, dtype: torch.dtype, *, warn: bool) -> bool:
    """GPUs that know TF32 and bfloat16, unless KRONBLOCKS_TRITON=0 does without."""
    return device == "cuda" and dtype in DTYPES and trust.setting() != "0" and is_installed() and _has_their_arithmetic()


@functools.cache
def _has_their_arithmetic() -> bool:
    """Whether a GPU, where there is one, knows TF32 and bfloat16: NVIDIA's from compute capability 8.0 on."""
    if torch.version.hip is not None:
        return False
    found = [torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count())]
    return not found or max(found) >= trust.LEAST_CAPABILITY


def build() -> str:
    """Which compiler made which kernels, and whether they are checked: timings of others do not count."""
    import triton

    return f"{triton.__version__} {trust.sources()}{' unchecked' * (trust.setting() == '1')}"
