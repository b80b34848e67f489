"""Finds and loads the native kernels, once, when they are first asked for, and says why where there are none.

The library registers our operators for the CPU with torch's dispatcher, through torch's stable ABI. It is linked against no
runtime of OpenMP: it finds the one that torch uses behind torch's own library.
`KRONBLOCKS_NATIVE`, read once, is `0` (do without the kernels), or the path of a library to load instead of the installed one.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import os
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_char_p, c_int64, c_void_p
from pathlib import Path

from torch import Tensor

from kronblocks.core.errors import NativeFallbackWarning, OpenMPConflictWarning
from kronblocks.ops.pattern import add_watcher

ABI = 5  # what kb_abi() of the library must say; raised with every change of an operator or a function

# GNU's, Intel's and LLVM's; with a hash in the name where wheels vendor it
RUNTIME = re.compile(r"lib(g|i)?omp5?(-[0-9a-f]+)?\.(so|dylib)\b.*")


class Library:
    """The loaded library, beside its operators, which torch's dispatcher calls.

    Raises:
        OSError: the file cannot be loaded.
        AttributeError: it is another library.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._functions = ctypes.CDLL(str(path))
        self.abi: int = self._functions.kb_abi()

    def register(self) -> bool:
        """Let the operators compute with these kernels; whether torch agrees."""
        self._functions.kb_isa.restype = self._functions.kb_schema.restype = c_char_p
        self._functions.kb_watch.argtypes = (c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int64)
        self._functions.kb_forget.argtypes = (c_void_p,)
        if self._functions.kb_register(0):
            return False
        add_watcher(self)
        return True

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Meanwhile the operators compute on the CPU as they would without these kernels."""
        self._functions.kb_unregister()
        _loader.serves = False
        try:
            yield
        finally:
            self._functions.kb_register(0)
            _loader.serves = True

    def schemas(self) -> list[str]:
        """Of the operators, as the library would define them where no Python has."""
        found = itertools.takewhile(bool, map(self._functions.kb_schema, itertools.count()))
        return [text.decode() for text in found]

    def instruction_set(self) -> str:
        """ "baseline", "avx2", "avx512", "avx512vnni" or "avx512bf16": what the kernels that compute are compiled for."""
        return self._functions.kb_isa().decode()

    def use_instruction_set(self, name: str) -> bool:
        """Compute with the kernels for another one; False if this machine or this build lacks them."""
        return bool(self._functions.kb_use_isa(name.encode()))

    def shares_threads(self) -> bool:
        """Whether torch and the kernels use one runtime of OpenMP."""
        return bool(self._functions.kb_shares_threads())

    def watch(self, index: Tensor, sources: list[tuple[Tensor, Tensor | None]]) -> None:
        """Let compiled code find out when `index` is no longer true, see `kronblocks.ops.pattern`."""
        tensors = [index, *(t for pair in sources for t in pair if t is not None)]
        if any(t.device.type != "cpu" or not t.is_contiguous() for t in tensors):
            return
        numbers = [(now.data_ptr(), then.data_ptr() if then is not None else None, now.nbytes) for now, then in sources]
        mask, position = numbers[0], numbers[1] if len(numbers) > 1 else (None, None, 0)
        self._functions.kb_watch(index.data_ptr(), *mask, *position)

    def forget(self, index: int) -> None:
        """The index at this address is watched no more."""
        self._functions.kb_forget(index)


def load() -> Library | None:
    """The native library; None, with one warning per process (none with `KRONBLOCKS_NATIVE=0`), where it is not available."""
    return _loader.library(warn=True)


def is_loaded() -> bool:
    """Whether the kernels serve already. Loads nothing."""
    return _loader.serves


def unavailable_reason() -> str | None:
    """Why `load` gives None, or None if it gives the library. Loads it, but never warns of its absence."""
    _loader.library(warn=False)
    return _loader.reason


def openmp_runtimes(maps: str) -> list[str]:
    """The files of the OpenMP runtimes that a process has loaded, each once, from the text of its `/proc/self/maps`."""
    fields = (line.split(maxsplit=5) for line in maps.splitlines())
    paths = dict.fromkeys(line[5] for line in fields if len(line) == 6)
    return [path for path in paths if RUNTIME.fullmatch(os.path.basename(path))]


class _Loader:
    """What is known about the library: nothing before it is asked for, then either the library or the reason."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.serves = False
        self._library: Library | None = None
        self._tried = False
        self._lock = threading.Lock()
        self._silent = False  # switched off, or already warned

    def library(self, *, warn: bool) -> Library | None:
        if self._tried and (self.reason is None or not warn):
            return self._library
        conflict = None
        with self._lock:
            if not self._tried:
                conflict = self._try()
                self._tried = True
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
            library = Library(path)
        except OSError as error:
            self.reason = f"{path} failed to load ({error})"
        except AttributeError:
            self.reason = f"{path} is another library (it has no kb_abi)"
        else:
            if library.abi != ABI:
                self.reason = f"{path} is of another version (its ABI is {library.abi}, this one needs {ABI})"
            elif not library.register():
                self.reason = f"torch does not take the operators of {path}"
            else:
                self._library, self.serves = library, True
                return None if library.shares_threads() else _conflict()
        return None


def installed_files() -> list[Path]:
    """Where the library may be: beside this file, or, in an editable installation, in site-packages."""
    package = importlib.util.find_spec("kronblocks.ops.backends")
    return [Path(directory) / "_native.so" for directory in (package and package.submodule_search_locations) or ()]


def _conflict() -> str:
    maps = Path("/proc/self/maps")
    runtimes = openmp_runtimes(maps.read_text()) if maps.exists() else []
    return (
        f"The native kernels found another OpenMP runtime than torch ({' and '.join(runtimes) or 'two are loaded'}): their "
        "threads compete. Import torch before the package that brings the other one, or start Python with LD_PRELOAD set to "
        "torch's."
    )


_loader = _Loader()
