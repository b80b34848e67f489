"""Triton's interpreter, without work that it does again at each call of a device function."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def language_is_patched_once_a_launch() -> Iterator[None]:
    """It looks through the language for what to patch, at a launch and at each call inside it, where all is patched already."""
    if importlib.util.find_spec("triton") is None:
        yield
        return
    from triton import language
    from triton.runtime import interpreter

    def patch(function):
        parts = [each for each in function.__globals__.values() if each is language or each is language.core]
        done = parts and not any(language.core.is_builtin(part.load) for part in parts)
        return interpreter._LangPatchScope() if done else whole(function)

    with pytest.MonkeyPatch.context() as patched:
        if hasattr(interpreter, "_LangPatchScope"):
            whole = interpreter._patch_lang
            patched.setattr(interpreter, "_patch_lang", patch)
        yield
