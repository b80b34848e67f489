"""Run functions in their own process, and measure peak memory."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from kronblocks.core.errors import KronblocksError
from kronblocks_lab.training.accounting import PeakMemory

_M_MMAP_THRESHOLD = -3  # of mallopt, in glibc's malloc.h


class PeakBytes:
    """Peak memory since this object was made, above what was held then: of the process on a CPU, of the device on a GPU."""

    def __init__(self, device: str) -> None:
        self._device = device
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._base = torch.cuda.memory_allocated()
        else:
            self._process = PeakMemory()

    def bytes(self) -> int:
        """The peak so far."""
        if self._device == "cuda":
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - self._base
        return self._process.bytes()


def free_at_once() -> None:
    """Let this process give freed memory above 1 MiB back to the system at once, so that a peak is what was in use.

    Otherwise glibc keeps freed tensors, depending on their order: that changes a peak of 200 MiB by 30.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)


def alone(device: str, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function where nothing else counts in its peak memory: on a CPU in a process of its own, on a GPU right here."""
    return apart(function, *args) if device == "cpu" else function(*args)


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function of a module in a fresh process, where nothing else has left memory or threads behind.

    Raises:
        KronblocksError: the process died, which on Linux mostly means that memory ran out.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), free_at_once) as pool:
        try:
            return pool.submit(function, *args).result()
        except BrokenProcessPool as error:
            raise KronblocksError(f"the process of {args} died: is there enough memory?") from error
