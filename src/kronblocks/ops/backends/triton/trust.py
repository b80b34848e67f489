"""Which kernels may serve: those that have agreed with float64 on this device, in a few small problems.

A kernel is checked when it is first to be launched for a device, dtype, block size, rank and sizes of a launch. `trials.py` has
the problems. Verdicts are kept in the process, and in the user's cache folder for this GPU, driver, torch, Triton and these
sources. KRONBLOCKS_TRITON=0 does without the kernels, 1 without checks, and with `check` verdicts of the folder do not count.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from kronblocks.core import cache as kept
from kronblocks.core.errors import KronblocksError, PerformanceWarning
from kronblocks.ops.precision import float32_products

if TYPE_CHECKING:
    from kronblocks.ops.backends.triton.tuning import Sizes

Result = TypeVar("Result")

LEAST_CAPABILITY = (8, 0)
"""The first NVIDIA GPUs that know TF32 and bfloat16."""

_VERSION, _FOLDER = 1, "verdicts"
_SETTINGS = ("", "0", "1", "check")
_lock = threading.RLock()  # backward runs in threads of its own
_verdicts: dict[tuple[Unit, torch.device], str] = {}
_warned: set[tuple[Any, ...]] = set()
_refused_calls: set[tuple[Any, ...]] = set()
_on_trial = threading.local()


class Refused(Exception):
    """A kernel may not serve here: PyTorch's operators compute instead."""


class NotYet(Refused):
    """It cannot be checked now."""


class Unit(NamedTuple):
    """What is checked at once: one kernel as it is launched."""

    kernel: str
    dtype: torch.dtype
    block: tuple[int, int]
    rank: int = 0  # 0: free values
    several: bool = False  # banks of tiles
    adjoint: bool = False
    masked: bool = False
    precision: str = "ieee"
    sizes: Sizes | None = None

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        more = f" of rank {self.rank}{', adjoint' * self.adjoint}" if self.rank else ""
        return f"the Triton kernel {self.kernel!r} for {name} blocks of {self.block[0]}x{self.block[1]}{more}"


def unit_of(kernel: str, about: dict[str, Any], dtype: torch.dtype, sizes: Sizes | None) -> Unit:
    """The unit of a launch, of which `about` says what it depends on, as for `tuning.chosen`."""
    block = about.get("block") or about.get("tile", (0, 0))
    banks, rank = about.get("groups", 1) > 1, about.get("rank", 0)
    return Unit(
        kernel, dtype, tuple(block), rank, banks, about.get("adjoint", False), about.get("live", False), float32_products(), sizes
    )


def setting() -> str:
    """What KRONBLOCKS_TRITON asks for: "", "0", "1" or "check".

    Raises:
        KronblocksError: it is something else.
    """
    found = os.environ.get("KRONBLOCKS_TRITON", "")
    if found not in _SETTINGS:
        raise KronblocksError(f"KRONBLOCKS_TRITON is {found!r}: write 0 (none), 1 (unchecked) or check, or leave it out")
    return found


def applies(device: torch.device) -> bool:
    """Whether kernels have to be trusted on a device."""
    return device.type == "cuda" and setting() != "1"


def sizes_on_trial() -> Sizes | None:
    """The sizes that are being checked in this thread."""
    return getattr(_on_trial, "sizes", None)


def agrees(unit: Unit, device: torch.device) -> bool:
    """Whether a kernel may serve, after a check if it is not known."""
    if getattr(_on_trial, "unit", None) is not None or not applies(device):
        return True
    return not verdict(unit, device)


def require(unit: Unit, device: torch.device) -> None:
    """Let a kernel serve.

    Raises:
        Refused: it may not.
    """
    if not agrees(unit, device):
        raise Refused


def verdict(unit: Unit, device: torch.device) -> str:
    """ "" for a kernel that agrees with float64, else what differed. Warns once of each that is refused.

    Raises:
        NotYet: a CUDA graph is being recorded, and nothing is known.
        Refused: the GPU lacks their arithmetic.
    """
    known = _verdicts.get((unit, device))
    if known is None:
        with _lock:
            known = _verdicts.get((unit, device))
            if known is None:
                known = _verdicts[unit, device] = _found(unit, device)
    return known


def _found(unit: Unit, device: torch.device) -> str:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        raise Refused
    key = _key(unit, device)
    reason = None if setting() == "check" else _read(key)
    if reason is None:
        if _is_recorded(device):
            _warn((unit[:3], "capture"), f"{unit} is unchecked, and a CUDA graph is being recorded: call the model once before")
            raise NotYet
        reason, lasts = _try(unit, device)
        if lasts:
            kept.write(_FOLDER, _VERSION, key, differed=reason)
    if reason:
        _warn((*unit[:3], str(device)), f"{unit} is refused on {_name(device)}: {reason}")
    return reason


def _is_recorded(device: torch.device) -> bool:
    """Whether launches go to a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _try(unit: Unit, device: torch.device) -> tuple[str, bool]:
    """What differed, and whether that lasts."""
    from kronblocks.ops.backends.triton import trials

    _on_trial.unit, _on_trial.sizes = unit, unit.sizes
    try:
        return trials.differences(unit, device)
    finally:
        _on_trial.unit = _on_trial.sizes = None


def _warn(about: tuple[Any, ...], what: str) -> None:
    if about in _warned:
        return
    _warned.add(about)
    warnings.warn(
        f"{what[0].upper()}{what[1:]}. PyTorch's operators compute instead, which may be slower. `kronblocks doctor` says more: "
        "please report it. KRONBLOCKS_TRITON=check checks again, and 0 does without these kernels.",
        PerformanceWarning,
        stacklevel=2,
    )


def _read(key: str) -> str | None:
    content = kept.read(_FOLDER, _VERSION, key)
    found = None if content is None else content.get("differed")
    return found if isinstance(found, str) else None


def _key(unit: Unit, device: torch.device) -> str:
    return json.dumps({"unit": [str(each) for each in unit], **machine(device)}, sort_keys=True)


@functools.cache
def machine(device: torch.device) -> dict[str, str]:
    """What a verdict holds for, beside the kernel: GPU, driver, versions and sources."""
    import triton

    return {
        "device": _name(device),
        "driver": _driver() if device.type == "cuda" else "",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "sources": sources(),
    }


def _name(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} ({major}.{minor})"


def _driver() -> str:
    """The driver's own line, where the system has it, and CUDA's version of it."""
    file = Path("/proc/driver/nvidia/version")
    version = getattr(torch._C, "_cuda_getDriverVersion", lambda: "")()
    try:
        return f"{version} {file.read_text().splitlines()[0]}"
    except (OSError, IndexError):
        return str(version)


@functools.cache
def sources() -> str:
    """A hash of the kernels and of what launches them."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:16]


def forget() -> None:
    """Forget what this process knows; the files stay."""
    _verdicts.clear()
    _warned.clear()
    _refused_calls.clear()


def known() -> dict[str, str]:
    """The verdicts of this process: the unit and its device -> what differed, "" if nothing."""
    return {f"{unit}, {_name(device)}": reason for (unit, device), reason in _verdicts.items()}


def or_plain(own: Callable[..., Result], instead: Callable[..., Result]) -> Callable[..., Result]:
    """A product whose kernels compute if they may serve; else PyTorch's operators do."""

    @functools.wraps(own)
    def product(*arguments: Any) -> Result:
        if _refused_calls and _call(own, arguments) in _refused_calls:
            return instead(*arguments)
        try:
            return own(*arguments)
        except NotYet:
            return instead(*arguments)
        except Refused:
            _refused_calls.add(_call(own, arguments))
            return instead(*arguments)

    return product


def _call(own: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """What is refused at once: a product for all numbers of rows."""
    shapes = tuple(
        (each.device, each.dtype, each.shape[1:]) if isinstance(each, Tensor) else None if isinstance(each, tuple) else each
        for each in arguments
    )
    return own, float32_products(), *shapes
