"""Operators compute with the backend that a test is given."""

import pytest
from tests.conformance.backends import BACKENDS, Backend

from kronblocks.ops import backends


@pytest.fixture(params=[backend.parameter() for backend in BACKENDS])
def backend(request, monkeypatch) -> Backend:
    """The operators compute with this backend for the length of a test."""
    monkeypatch.setattr(backends, "pick", lambda tensor: request.param.module)
    return request.param
