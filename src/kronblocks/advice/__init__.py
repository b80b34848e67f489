"""What block sparsity would gain: layers measured on this machine."""

from kronblocks.advice.measuring import advise
from kronblocks.advice.report import Advice

__all__ = [
    "Advice",
    "advise",
]
