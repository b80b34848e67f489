"""The precision of float32 products on a GPU, by torch's settings."""

from __future__ import annotations

import torch


def float32_products() -> str:
    """ "tf32" where operands may be rounded to TF32, else "ieee".

    It reads the setting that both of torch's interfaces write. `torch.get_float32_matmul_precision` raises once the newer
    interface, `torch.backends.cuda.matmul.fp32_precision`, was used.
    """
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
