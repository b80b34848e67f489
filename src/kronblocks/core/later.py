"""Do something once a module is imported, without importing it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def when_imported(name: str, run: Callable[[], object]) -> None:
    """Call `run` after the module of this name has been imported: immediately if that has happened, else as soon as it does.

    An import that fails leaves this waiting for the next one.
    """
    module = sys.modules.get(name)
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        run()
    else:
        sys.meta_path.insert(0, _Finder(name, run))


class _Finder(MetaPathFinder):
    """Finds one module where the others find it, and adds a call to the end of its import."""

    def __init__(self, name: str, run: Callable[[], object]) -> None:
        self._name, self._run, self._asks = name, run, False

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self._name or self._asks:
            return None
        self._asks = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asks = False
        if spec is None or spec.loader is None:
            return None
        spec.loader = _Loader(spec.loader, self._done)
        return spec

    def _done(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)
            self._run()


class _Loader(Loader):
    """Another loader, and a call after it."""

    def __init__(self, inner: Loader, then: Callable[[], object]) -> None:
        self._inner, self._then = inner, then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        spec: Any = module.__spec__
        spec.loader = module.__loader__ = self._inner  # what the module and `inspect` see
        self._inner.exec_module(module)
        self._then()
