"""Operators compute with the backend that a test is given."""

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
from tests.conformance.backends import BACKENDS, Backend

from kronblocks.ops import backends
from kronblocks.ops.backends import library, native


@pytest.fixture(params=[backend.parameter() for backend in BACKENDS])
def backend(request, monkeypatch) -> Iterator[Backend]:
    """The operators compute with this backend for the length of a test."""
    monkeypatch.setattr(backends, "pick", lambda tensor: request.param.module)
    loaded = None if request.param.module is native or library.unavailable_reason() else library.load()
    with nullcontext() if loaded is None else loaded.aside():
        yield request.param
