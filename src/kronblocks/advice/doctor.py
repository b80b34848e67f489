"""`examine`: whether what should work on this machine does, in a few seconds. It is what a bug report begins with."""

from __future__ import annotations

import dataclasses
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch

from kronblocks.advice.paths import PATHS, difference, speeds
from kronblocks.core import cache
from kronblocks.ops import backends
from kronblocks.ops.backends import library, triton
from kronblocks.ops.backends.triton import trust

State = Literal["ok", "note", "fails"]


@dataclass(frozen=True)
class Finding:
    """One line of the examination.

    Args:
        about: what was looked at.
        state: "ok"; "note" for what is missing or switched off, and need not be there; "fails" for what should work.
        what: what was found.
    """

    about: str
    state: State
    what: str


def examine() -> list[Finding]:
    """Look at versions, compiled kernels, OpenMP, the cache folder and GPUs; compute and time a small layer in each way.

    Nothing is changed but the cache folder, which keeps verdicts on Triton's kernels. It takes a few seconds, and about half a
    minute where Triton compiles its kernels for the first time.
    """
    devices = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    parts: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("versions", _versions),
        ("C++ kernels", _native),
        ("cache", _cache),
        ("GPUs", _gpus),
        ("Triton kernels", lambda: _triton(devices[1:])),
        ("results", lambda: _results(devices)),
        ("speed", lambda: _speeds(devices)),
    ]
    findings: list[Finding] = []
    for about, part in parts:
        try:
            findings += part()
        except Exception as error:  # whatever is broken here is what the report is about
            findings.append(Finding(about, "fails", _words(error)))
    return findings


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no words'])[0][:300]}"


def _versions() -> Iterator[Finding]:
    yield Finding("kronblocks", "ok", f"{version('kronblocks')}, Python {platform.python_version()}, {platform.platform()}")
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    yield Finding("torch", "ok", f"{torch.__version__}, {threads}, {cache.processor()}")
    others = ("triton", "transformers", "lightning", "accelerate", "peft")
    yield Finding("beside it", "ok", ", ".join(f"{name} {_version(name)}" for name in others))


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "is not installed"


def _native() -> Iterator[Finding]:
    reason, about = library.unavailable_reason(), "C++ kernels"
    loaded = library.load() if reason is None else None
    if loaded is not None:
        yield Finding(about, "ok", f"{loaded.instruction_set()}, {loaded.path}")
    elif reason is not None and reason.startswith("not built"):
        yield Finding(about, "note", f"{reason}: install a C++ compiler with OpenMP, then kronblocks again. PyTorch computes")
    else:
        yield Finding(about, "note" if "KRONBLOCKS_NATIVE=0" in str(reason) else "fails", f"{reason}. PyTorch computes")
    maps = Path("/proc/self/maps")
    runtimes = ", ".join(library.openmp_runtimes(maps.read_text())) if maps.exists() else ""
    if loaded is not None and not loaded.shares_threads():
        advice = "import torch first, or start Python with LD_PRELOAD set to torch's"
        yield Finding("OpenMP", "fails", f"kernels and torch use two runtimes, whose threads compete: {advice}. {runtimes}")
    else:
        yield Finding("OpenMP", "ok", runtimes or "the system has no list of what is loaded")


def _cache() -> Iterator[Finding]:
    folder, about = cache.cache_folder(), "cache"
    if folder is None:
        yield Finding(about, "note", "there is none (KRONBLOCKS_CACHE): each process measures again")
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        advice = "name another in KRONBLOCKS_CACHE, or switch it off with KRONBLOCKS_CACHE=0"
        yield Finding(about, "fails", f"{folder} cannot be written to ({error.strerror}): {advice}")
        return
    kinds = {kind.name: sum(1 for _ in kind.glob("*.json")) for kind in sorted(folder.iterdir()) if kind.is_dir()}
    held = ", ".join(f"{count} {name}" for name, count in kinds.items()) or "empty"
    yield Finding(about, "ok", f"{folder}: {held}")


def _gpus() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        if Path("/dev/nvidia0").exists():
            why = "is built without CUDA" if torch.version.cuda is None else f"is built for CUDA {torch.version.cuda}"
            yield Finding("GPUs", "fails", f"there is an NVIDIA GPU, but torch sees none: torch {torch.__version__} {why}")
        else:
            yield Finding("GPUs", "note", "torch sees none")
        return
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        size = f"{about.total_memory / 2**30:.0f} GiB"
        yield Finding(f"cuda:{number}", "ok", f"{about.name}, {about.major}.{about.minor}, {size}, CUDA {torch.version.cuda}")


def _triton(devices: list[str]) -> Iterator[Finding]:
    about, setting = "Triton kernels", trust.setting()
    if not devices:
        yield Finding(about, "note", "they serve NVIDIA GPUs only")
    elif setting == "0":
        yield Finding(about, "note", "switched off by KRONBLOCKS_TRITON=0")
    elif not triton.is_installed():
        yield Finding(about, "note", "Triton is not installed: pip install triton. PyTorch computes")
    elif not triton.serves("cuda", torch.float32, warn=False):
        yield Finding(about, "note", "they need an NVIDIA GPU of compute capability 8.0 or more. PyTorch computes")
    elif setting == "1":
        yield Finding(about, "note", "serve unchecked, as KRONBLOCKS_TRITON=1 asks")
    else:
        yield from _verdicts(devices)


def _verdicts(devices: list[str]) -> Iterator[Finding]:
    """What their checks say, after each path has computed once."""
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16):
            for path in PATHS:
                path.run(device, dtype)
    for what, differed in trust.known().items():
        yield Finding("Triton", "fails" if differed else "ok", f"{what}: {differed or 'agrees with float64'}")


def _results(devices: list[str]) -> Iterator[Finding]:
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16):
            name, wrong = str(dtype).removeprefix("torch."), 0
            for path in PATHS:
                try:
                    differed = difference(path, device, dtype)
                except Exception as error:  # as above
                    differed = _words(error)
                if differed:
                    wrong += 1
                    yield Finding(f"{device} {name}", "fails", f"{path.name}: {differed}")
            if not wrong:
                backend = backends.expected(device, dtype).name
                ways = ", ".join(path.name for path in PATHS)
                yield Finding(f"{device} {name}", "ok", f"{backend} agrees with float64: {ways}")


def _speeds(devices: list[str]) -> Iterator[Finding]:
    for device in devices:
        for what, seconds, dense in speeds(device):
            ratio = dense / seconds
            times = f"{1e3 * seconds:.3g} ms, dense {1e3 * dense:.3g} ms: {ratio:.2g}x"
            yield Finding(f"{device} speed", "ok" if ratio >= 1 else "note", f"{what}: {times}")


def as_json(findings: list[Finding]) -> dict[str, object]:
    """The findings as plain values."""
    return {"works": works(findings), "findings": [dataclasses.asdict(each) for each in findings]}


def works(findings: list[Finding]) -> bool:
    """Whether everything does that should."""
    return all(each.state != "fails" for each in findings)
