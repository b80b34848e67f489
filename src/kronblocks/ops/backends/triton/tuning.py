"""Sizes of launches: a default, or with tuning the fastest of several.

KRONBLOCKS_TUNE=1 times them when a kernel first gets a shape, and keeps the fastest in the user's cache folder. Sizes decide how
sums are rounded, so results may differ between machines that were tuned differently. Under
`torch.use_deterministic_algorithms(True)` nothing is tuned, and tuned sizes are not used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from kronblocks.core import cache as kept
from kronblocks.ops.backends.triton import trust
from kronblocks.ops.backends.triton.launch import on_device_of, padded

Result = TypeVar("Result")

_VERSION = 2
_memo: dict[str, Sizes] = {}
_fitting: dict[tuple[Hashable, Sizes], Sizes] = {}  # what ran in place of what did not fit


@dataclass(frozen=True)
class Sizes:
    """Of one launch: output blocks, rows, input blocks and terms that a program takes at a time, its warps, and loads ahead."""

    outputs: int
    rows: int
    sources: int
    warps: int
    stages: int
    terms: int = 1

    def settings(self) -> dict[str, int]:
        """As all kernels know them."""
        return {"BO": self.outputs, "BT": self.rows, "BK": self.sources, "num_warps": self.warps, "num_stages": self.stages}


def wanted(device: torch.device) -> bool:
    """Whether launches on a device are tuned."""
    asked = os.environ.get("KRONBLOCKS_TUNE") == "1" and not torch.are_deterministic_algorithms_enabled()
    return asked and device.type == "cuda"


def chosen(
    kernel: str, about: dict[str, Any], x: Tensor, default: Sizes, others: Iterable[Sizes], run: Callable[[Sizes], Result]
) -> Result:
    """Run a launch with the sizes that suit it, or where tuning is wanted with the quickest; arguments as of `tuned`.

    Raises:
        Refused: the kernel does not agree with float64 on this device.
    """
    on_trial = trust.sizes_on_trial()
    if on_trial is None and wanted(x.device):
        return tuned(kernel, about, x, default, others, run)
    if on_trial is None:
        trust.require(trust.unit_of(kernel, about, x.dtype, default), x.device)
    return within_resources((kernel, *about.values(), x.device), on_trial or default, run)


def tuned(
    kernel: str, about: dict[str, Any], x: Tensor, default: Sizes, others: Iterable[Sizes], run: Callable[[Sizes], Result]
) -> Result:
    """Run a launch with the sizes known to be quickest for its shape, or after finding them; but nothing is tried while a CUDA
    graph is recorded.

    Args:
        kernel: its name.
        about: what the quickest sizes depend on, beside x and the machine.
        x: numbers of its rows up to the same power of two count as one.
        default: sizes that suit, without a measurement.
        others: what else to try.
        run: the launch; called several times to measure it.
    """
    key = json.dumps({"kernel": kernel, **about, "rows": padded(max(1, x.shape[0])), **_machine(x.device)}, sort_keys=True)
    if key not in _memo:
        others = list(others)
        known = _read(key, (default, *others))
        with on_device_of([x]):
            if known is None and _recording():
                trust.require(trust.unit_of(kernel, about, x.dtype, default), x.device)
                return within_resources(key, default, run)
            _memo[key] = known or _quickest(key, default, others, run)
    sizes = _memo[key]
    if not trust.agrees(trust.unit_of(kernel, about, x.dtype, sizes), x.device):
        sizes = default
        trust.require(trust.unit_of(kernel, about, x.dtype, sizes), x.device)
    return within_resources(key, sizes, run)


def within_resources(launched: Hashable, sizes: Sizes, run: Callable[[Sizes], Result]) -> Result:
    """Run a launch, with less at a time on a GPU whose shared memory does not hold it.

    Args:
        launched: all that its need of shared memory depends on, beside sizes: what fitted is remembered for it.
        sizes: what a program takes.
        run: the launch.

    Raises:
        OutOfResources: it does not hold the least either.
    """
    from triton.runtime.errors import OutOfResources

    known = _fitting.get((launched, sizes), sizes)
    failure: OutOfResources | None = None
    for fewer in _fewer(known):
        try:
            result = run(fewer)
        except OutOfResources as error:
            failure = error
            continue
        if fewer != sizes:
            _fitting[launched, sizes] = fewer
        return result
    raise failure or AssertionError(f"{sizes} has no stages")


def _fewer(sizes: Sizes) -> Iterator[Sizes]:
    """The sizes, then those with fewer loads ahead, then with half the input blocks, then with half the outputs."""
    while True:
        for stages in range(sizes.stages, 0, -1):
            yield dataclasses.replace(sizes, stages=stages)
        if sizes.sources > 16:
            sizes = dataclasses.replace(sizes, sources=sizes.sources // 2)
        elif sizes.outputs > 16:
            sizes = dataclasses.replace(sizes, outputs=sizes.outputs // 2)
        else:
            return


def _recording() -> bool:
    """Whether a CUDA graph is being recorded."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def forget() -> None:
    """Forget what this process knows; the files stay."""
    _memo.clear()
    _fitting.clear()


@functools.cache
def _machine(device: torch.device) -> dict[str, str]:
    import triton

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "torch": torch.__version__, "triton": triton.__version__}


def _quickest(key: str, default: Sizes, others: Iterable[Sizes], run: Callable[[Sizes], Any]) -> Sizes:
    from triton.errors import TritonError

    seconds: dict[Sizes, float] = {}
    for sizes in (default, *others):
        with contextlib.suppress(TritonError, RuntimeError):  # more registers or shared memory than there are, or than compile
            seconds[sizes] = _seconds(functools.partial(run, sizes))
    best = min(seconds, key=seconds.__getitem__, default=default)
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
