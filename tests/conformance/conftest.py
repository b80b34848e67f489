"""Operators compute with the backend that a test is given, and may find new memory poisoned."""

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
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


@pytest.fixture
def poisoned(monkeypatch) -> Iterator[None]:
    """New memory is NaN (or the largest whole number), so that whatever is not written shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(100).isnan().all(), "the poison works"
    yield
    torch.use_deterministic_algorithms(before)
