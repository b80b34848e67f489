"""How precisely a GPU takes float32 products, as torch is set."""

from __future__ import annotations

import torch


def float32_products() -> str:
    """ "tf32" where operands may be rounded to TF32, else "ieee".

    From the setting in which both of torch's ways to say so end: `torch.get_float32_matmul_precision` raises once the newer of
    them, `torch.backends.cuda.matmul.fp32_precision`, was used.
    """
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
