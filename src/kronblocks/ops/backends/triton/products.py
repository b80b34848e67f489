"""Products on tensor cores, for all kernels."""

# pyright: reportArgumentType=false
# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _high(a):
    """float32 rounded to TF32, which keeps the first 10 of 23 bits behind the point."""
    return ((a.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr, SUM: tl.constexpr):
    """total + a b. "tf32x3" takes float32 in two parts each and leaves out the product of the low ones, 2^-22 of the whole.

    tl.dot knows it too, but looks for values that are not finite in every operand and sum, which takes longer than the products.
    """
    if PRECISION == "tf32x3" and a.dtype == tl.float32:
        a_high, b_high = _high(a), _high(b)
        total = tl.dot(a - a_high, b_high, total, input_precision="tf32", out_dtype=SUM)
        total = tl.dot(a_high, b - b_high, total, input_precision="tf32", out_dtype=SUM)
        return tl.dot(a_high, b_high, total, input_precision="tf32", out_dtype=SUM)
    return tl.dot(a, b, total, input_precision=PRECISION, out_dtype=SUM)
