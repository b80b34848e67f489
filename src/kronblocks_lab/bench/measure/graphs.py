"""Calls recorded as CUDA graphs: a replay launches nothing one by one, so small problems show what their kernels take."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")

_WARM_UPS = 3  # calls on another stream, in which libraries take what they need and a graph could not


def graphed(call: Callable[[], Result]) -> Callable[[], Result]:
    """A call's replay; what it returns is filled again by each.

    Args:
        call: the same work on the same tensors every time, without reading anything back from the device.

    Raises:
        RuntimeError: it does something that cannot be recorded. The process is as it was before.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph, before, pool = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool=pool):
            result = call()
    except Exception:
        torch.cuda.set_stream(before)  # which a failed capture leaves undone, as it does the allocator's pool
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            torch._C._cuda_releasePool(torch.cuda.current_device(), pool)
        raise

    def replay() -> Result:
        graph.replay()
        return result

    return replay
