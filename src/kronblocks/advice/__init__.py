"""Measure on this machine what block sparsity would gain."""

from kronblocks.advice.measuring import advise
from kronblocks.advice.report import Advice

__all__ = [
    "Advice",
    "advise",
]
