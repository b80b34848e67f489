"""Kernels for NVIDIA GPUs, written in Triton: float32, float16 and bfloat16 with sums in float32 (float64 in its interpreter).

`packed.py` multiplies by live blocks, `fused.py` by factors, and `weights.py` builds blocks or W from factors. Each launches the
kernels of its `*_kernels` module. There are no atomic additions, so results are the same from run to run.

With TRITON_INTERPRET=1, set before the kernels are loaded, they run on a CPU. Tests without a GPU do that.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from kronblocks.ops.backends.triton.estimate import call_seconds, efficiency, keeps_on_chip
from kronblocks.ops.backends.triton.fused import kron_backward, kron_linear
from kronblocks.ops.backends.triton.packed import packed_grad_input, packed_grad_values, packed_linear
from kronblocks.ops.backends.triton.weights import live_blocks, live_blocks_backward

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


@functools.cache
def is_installed() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def serves(device: str, dtype: torch.dtype, *, warn: bool) -> bool:
    """GPUs that know TF32 and bfloat16.

    Only where KRONBLOCKS_TRITON=1 asks for them, as long as they have been compiled for GPUs but run on none.
    """
    wanted = os.environ.get("KRONBLOCKS_TRITON") == "1"
    return wanted and device == "cuda" and dtype in DTYPES and is_installed() and _has_their_arithmetic()


@functools.cache
def _has_their_arithmetic() -> bool:
    """Whether the GPU, where there is one, knows TF32 and bfloat16: NVIDIA's from compute capability 8.0 on."""
    return torch.version.hip is None and (not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 0))


@functools.cache
def build() -> str:
    """Which compiler made the kernels: timings of another one's do not count."""
    import triton

    return triton.__version__
