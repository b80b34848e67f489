"""Who computes: found once, and what it wants."""

import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from kronblocks import KroneckerBlockLinear
from kronblocks.core import NativeFallbackWarning
from kronblocks.ops import backends
from kronblocks.ops.backends import library
from kronblocks.ops.backends import torch as plain


@pytest.fixture
def without_native(monkeypatch):
    """As in a process that has computed nothing, and has no native kernels."""
    monkeypatch.delenv("KRONBLOCKS_NATIVE", raising=False)
    monkeypatch.setattr(library, "_loader", library._Loader())
    monkeypatch.setattr(library, "installed_files", lambda: [Path("/nowhere/_native.so")])
    backends.look_again()
    yield
    backends.look_again()


@pytest.mark.usefixtures("without_native")
def test_the_first_product_warns_of_a_fallback_and_questions_do_not():
    x = torch.ones(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.expected("cpu", x.dtype) is plain
        assert backends.backend_key("cpu", x.dtype) == "torch"
    with pytest.warns(NativeFallbackWarning, match="not built"):
        assert backends.pick(x) is plain
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.pick(x) is plain


def test_who_serves_is_asked_once(monkeypatch):
    asked = []
    serves = plain.serves
    monkeypatch.setattr(plain, "serves", lambda *about, warn: asked.append(about) or serves(*about, warn=warn))
    backends.look_again()
    for _ in range(3):
        assert backends.pick(torch.ones(2, dtype=torch.complex64)) is plain
    assert asked == [("cpu", torch.complex64)]
    backends.look_again()
    backends.pick(torch.ones(2, dtype=torch.complex64))
    assert len(asked) == 2


@pytest.mark.parametrize("wants_masks", [True, False])
def test_a_backend_gets_masks_without_dead_blocks_only_if_it_wants_them(wants_masks, monkeypatch):
    given: list[torch.Tensor | None] = []

    def kron_linear(x, coeff, tiles, bias, live, plan):
        given.append(live)
        return multiply(x, coeff, tiles, bias, live, plan)

    multiply = plain.kron_linear
    monkeypatch.setattr(plain, "kron_linear", kron_linear)
    monkeypatch.setattr(plain, "wants_masks", wants_masks)
    monkeypatch.setattr(backends, "pick", lambda tensor: plain)
    loaded = library.load()
    with nullcontext() if loaded is None else loaded.aside():
        layer, x = KroneckerBlockLinear(8, 12, (3, 2), rank=2, plan="coeff_first"), torch.ones(5, 8)
        layer(x)
        assert (given[-1] is not None) == wants_masks
        mask = torch.ones(4, 4, dtype=torch.bool)
        mask[1, 2] = False
        layer.set_block_mask_(mask)
        layer(x)
        assert given[-1] is not None
