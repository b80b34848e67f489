"""Sizes of launches: a sane choice without a measurement, the quickest of several with one.

KRONBLOCKS_TUNE=1 tries them when a kernel first meets a shape, and keeps the winner in the user's cache folder. Sizes decide how
sums are rounded, so that results may differ from those of a machine that tuned otherwise; under
`torch.use_deterministic_algorithms(True)` nothing is tuned and nothing that was tuned is used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from kronblocks.ops import kept
from kronblocks.ops.backends.triton.launch import padded

Result = TypeVar("Result")

_VERSION = 1
_memo: dict[str, Sizes] = {}


@dataclass(frozen=True)
class Sizes:
    """Of one launch: output blocks, rows and input blocks that a program takes at a time, its warps, and loads ahead of use."""

    outputs: int
    rows: int
    sources: int
    warps: int
    stages: int

    def settings(self) -> dict[str, int]:
        """As the kernels know them."""
        return {"BO": self.outputs, "BT": self.rows, "BK": self.sources, "num_warps": self.warps, "num_stages": self.stages}


def wanted(device: torch.device) -> bool:
    """Whether launches on a device are tuned."""
    asked = os.environ.get("KRONBLOCKS_TUNE") == "1" and not torch.are_deterministic_algorithms_enabled()
    return asked and device.type == "cuda"


def tuned(
    kernel: str, about: dict[str, Any], rows: int, default: Sizes, others: Iterable[Sizes], run: Callable[[Sizes], Result]
) -> Result:
    """Run a launch with the sizes known to be quickest for its shape, or after finding them; but nothing is tried while a CUDA
    graph is recorded.

    Args:
        kernel: its name.
        about: what the quickest sizes depend on, beside rows and the machine.
        rows: of x; numbers up to the same power of two count as one.
        default: sizes that are always possible.
        others: what else to try.
        run: the launch; called several times to measure it.
    """
    key = json.dumps({"kernel": kernel, **about, "rows": padded(max(1, rows)), **_machine()}, sort_keys=True)
    if key not in _memo:
        others = list(others)
        known = _read(key, (default, *others))
        if known is None and _recording():
            return run(default)
        _memo[key] = known or _quickest(key, default, others, run)
    return run(_memo[key])


def _recording() -> bool:
    """Whether a CUDA graph is being recorded."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def forget() -> None:
    """Forget what this process knows; the files stay."""
    _memo.clear()


@functools.cache
def _machine() -> dict[str, str]:
    import triton

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"device": device, "torch": torch.__version__, "triton": triton.__version__}


def _quickest(key: str, default: Sizes, others: Iterable[Sizes], run: Callable[[Sizes], Any]) -> Sizes:
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    seconds = {default: _seconds(lambda: run(default))}
    for sizes in others:
        with contextlib.suppress(OutOfResources, PTXASError, CompilationError):  # more registers or shared memory than there are
            seconds[sizes] = _seconds(functools.partial(run, sizes))
    best = min(seconds, key=seconds.__getitem__)
    kept.write("sizes", _VERSION, key, sizes=dataclasses.asdict(best))
    return best


def _seconds(run: Callable[[], object]) -> float:
    import triton.testing

    milliseconds = triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median")
    assert isinstance(milliseconds, float)  # of one quantile
    return 1e-3 * milliseconds


def _read(key: str, possible: Iterable[Sizes]) -> Sizes | None:
    content = kept.read("sizes", _VERSION, key)
    sizes = None if content is None else content.get("sizes")
    return next((each for each in possible if dataclasses.asdict(each) == sizes), None)
