"""What waits for a module is called once it is imported, and not before."""

from __future__ import annotations

import importlib
import inspect
import sys
import time
import tracemalloc

import pytest

from kronblocks.core.later import when_imported


def module(folder, name: str, text: str = "") -> str:
    (folder / f"{name}.py").write_text(text)
    importlib.invalidate_caches()
    return name


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    return tmp_path


def test_it_is_called_after_the_import_and_once(folder):
    name, calls = module(folder, "kb_later_one", "VALUE = 1\n"), []
    when_imported(name, lambda: calls.append(sys.modules[name].VALUE))
    assert name not in sys.modules and not calls
    found = importlib.import_module(name)
    assert calls == [1] and inspect.getsource(found) == "VALUE = 1\n"
    assert type(found.__loader__) is type(found.__spec__.loader) is type(tracemalloc.__loader__)
    importlib.reload(found)
    assert calls == [1]


def test_it_is_called_at_once_if_the_module_is_there():
    calls = []
    when_imported("time", lambda: calls.append(time.time()))
    assert len(calls) == 1


def test_it_waits_for_the_import_that_succeeds(folder):
    name, calls = module(folder, "kb_later_two", "raise ImportError('not yet')\n"), []
    when_imported(name, lambda: calls.append(1))
    with pytest.raises(ImportError, match="not yet"):
        importlib.import_module(name)
    assert not calls
    module(folder, name, "VALUE = 22222\n")
    assert importlib.import_module(name).VALUE == 22222 and calls == [1]


def test_a_module_that_is_nowhere_is_no_error_of_ours(folder):
    when_imported("kb_later_none", lambda: None)
    with pytest.raises(ModuleNotFoundError, match="kb_later_none"):
        importlib.import_module("kb_later_none")
