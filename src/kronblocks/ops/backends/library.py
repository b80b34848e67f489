"""Finds and loads the native kernels, once, when they are first asked for, and says why where there are none.

The library is plain C, compiled with OpenMP but linked against no runtime of it: its calls go to the one that torch has loaded.
`KRONBLOCKS_NATIVE`, read once, is `0` (do without the kernels), or the path of a library to load instead of the installed one.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
import os
import re
import threading
import warnings
from pathlib import Path

import torch

from kronblocks.core.errors import NativeFallbackWarning, OpenMPConflictWarning

ABI = 2  # what kb_abi() of the library must say; raised with every change of a signature

# GNU's, Intel's and LLVM's; with a hash in the name where wheels vendor it
RUNTIME = re.compile(r"lib(g|i)?omp5?(-[0-9a-f]+)?\.(so|dylib)\b.*")


def load() -> ctypes.CDLL | None:
    """The native library; None, with one warning per process (none with `KRONBLOCKS_NATIVE=0`), where it is not available."""
    return _loader.library(warn=True)


def unavailable_reason() -> str | None:
    """Why `load` gives None, or None if it gives the library. Loads it, but never warns of its absence."""
    _loader.library(warn=False)
    return _loader.reason


def openmp_runtimes(maps: str) -> list[str]:
    """The files of the OpenMP runtimes that a process has loaded, each once, from the text of its `/proc/self/maps`."""
    fields = (line.split(maxsplit=5) for line in maps.splitlines())
    paths = dict.fromkeys(line[5] for line in fields if len(line) == 6)
    return [path for path in paths if RUNTIME.fullmatch(os.path.basename(path))]


def torch_runtime(runtimes: list[str], torch_dir: Path) -> str | None:
    """The runtime that torch brought, of those loaded; the first one where none lies with torch (conda's, the system's)."""
    own = [path for path in runtimes if {torch_dir, torch_dir.with_suffix(".libs")} & set(Path(path).parents)]
    return next(iter(own or runtimes), None)


class _Loader:
    """What is known about the library: nothing before it is asked for, then either the library or the reason."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._library: ctypes.CDLL | None = None
        self._tried = False
        self._lock = threading.Lock()
        self._silent = False  # switched off, or already warned

    def library(self, *, warn: bool) -> ctypes.CDLL | None:
        conflict = None
        with self._lock:
            if not self._tried:
                self._tried = True
                conflict = self._try()
            fallback = warn and self.reason is not None and not self._silent
            self._silent |= fallback
        if conflict:
            warnings.warn(conflict, OpenMPConflictWarning, stacklevel=3)
        if fallback:
            warnings.warn(
                f"The native kernels are not used, only PyTorch's: {self.reason}. Install a C++ compiler with OpenMP and then "
                "kronblocks again, or set KRONBLOCKS_NATIVE=0 to do without them.",
                NativeFallbackWarning,
                stacklevel=3,
            )
        return self._library

    def _try(self) -> str | None:
        """Load the library or set the reason; returns what is to be said about a conflict of OpenMP runtimes."""
        setting = os.environ.get("KRONBLOCKS_NATIVE", "")
        if setting == "0":
            self.reason, self._silent = "switched off by KRONBLOCKS_NATIVE=0", True
            return None
        candidates = [Path(setting)] if setting not in ("", "1") else installed_files()
        path = next((path for path in candidates if path.is_file()), None)
        if path is None:
            self.reason = f"not built (there is no {' and no '.join(map(str, candidates))})"
            return None
        try:
            conflict = _provide_openmp()
            library = ctypes.CDLL(str(path))
            abi = library.kb_abi()
        except OSError as error:
            self.reason = f"{path} failed to load ({error})"
        except AttributeError:
            self.reason = f"{path} is another library (it has no kb_abi)"
        else:
            if abi == ABI:
                self._library = library
                return conflict
            self.reason = f"{path} is of another version (its ABI is {abi}, this one needs {ABI})"
        return None


def installed_files() -> list[Path]:
    """Where the library may be: beside this file, or, in an editable installation, in site-packages."""
    package = importlib.util.find_spec("kronblocks.ops.backends")
    return [Path(directory) / "_native.so" for directory in (package and package.submodule_search_locations) or ()]


def _provide_openmp() -> str | None:
    """Let the library find torch's OpenMP runtime (the system's if torch has none); returns what is wrong where two compete."""
    torch_dir = Path(torch.__file__).resolve().parent
    maps = Path("/proc/self/maps")
    runtimes = openmp_runtimes(maps.read_text()) if maps.exists() else [*map(str, torch_dir.glob("lib/libomp.dylib"))]
    runtime = torch_runtime(runtimes, torch_dir) or ctypes.util.find_library("gomp") or "libgomp.so.1"
    ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)
    if len(runtimes) < 2 or _torch_follows(ctypes.CDLL(None)):
        return None
    return (
        f"The process has loaded {len(runtimes)} OpenMP runtimes, {' and '.join(runtimes)}, and the native kernels got "
        f"another one than torch: their threads compete. Import kronblocks first, or start Python with LD_PRELOAD={runtime}."
    )


def _torch_follows(process: ctypes.CDLL) -> bool:
    """Whether a number of threads set in the runtime that the library will find is the one that torch then reports."""
    before = torch.get_num_threads()
    process.omp_set_num_threads(before + 1)
    try:
        return torch.get_num_threads() == before + 1
    finally:
        process.omp_set_num_threads(before)


_loader = _Loader()
