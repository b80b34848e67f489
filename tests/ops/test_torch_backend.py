"""PyTorch's own backend as it computes on a GPU: it reads nothing back, and launches as much for every grid."""

from __future__ import annotations

import itertools
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from kronblocks import BlockSparseLinear, KroneckerBlockLinear
from kronblocks.ops import BlockIndex, backends
from kronblocks.ops.backends import by_rows, library, whole
from kronblocks.ops.backends import torch as plain
from kronblocks.ops.plans import PLANS

READS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique_dim", "bincount"}
VIEWS = {"permute", "transpose", "t", "unsqueeze", "squeeze", "view", "_unsafe_view", "slice", "select"}
PRODUCTS = ("packed", *(plan for plan in PLANS if plan != "packed"))


def traced(product: str, grid: tuple[int, int], groups: int) -> Counter[str]:
    """The operators of a forward and a backward, by name. Nothing has a number here, so none can be read."""
    (m1, n1), capacity, (bm, bn), rows = grid, 5, (3, 4), 7

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape)

    def packed(x, dy, coeff, tiles, bias, live, *index):
        at = BlockIndex(*index)
        values = plain.live_blocks(coeff, tiles, at)
        dvalues = plain.packed_grad_values(dy, x, at)
        products = plain.packed_linear(x, values, at, bias), plain.packed_grad_input(dy, values, at)
        return *products, *plain.live_blocks_backward(dvalues, coeff, tiles, at)

    def factored(x, dy, coeff, tiles, bias, live, *index):
        y = plain.kron_linear(x, coeff, tiles, bias, live, PLANS[product])
        return y, *plain.kron_backward(dy, x, coeff, tiles, live, PLANS[product], True)

    with FakeTensorMode():
        live = torch.empty(grid, dtype=torch.bool)
        sizes = (m1 + 1, capacity, capacity, capacity, n1 + 1, capacity)
        index = [torch.empty(size, dtype=torch.int32) for size in sizes]
        operands = (empty(rows, n1 * bn), empty(rows, m1 * bm), empty(m1, n1, 2), empty(groups, 2, bm, bn), empty(m1 * bm))
        graph = make_fx(packed if product == "packed" else factored)(*operands, live, *index)
    return Counter(str(node.target).split(".")[1] for node in graph.graph.nodes if node.op == "call_function")


@pytest.mark.parametrize(("product", "groups"), itertools.product(PRODUCTS, (1, 2)))
def test_nothing_is_read_back_and_launches_do_not_grow_with_the_grid(product, groups, monkeypatch):
    monkeypatch.setattr(plain, "_by", lambda tensor: whole)
    small, large = (traced(product, grid, groups) for grid in ((4, 3), (64, 48)))
    assert small == large
    assert not READS & small.keys()
    assert sum(count for name, count in small.items() if name not in VIEWS) <= 60


def test_the_cpu_multiplies_by_rows_and_other_devices_build_the_weight(monkeypatch):
    asked = []
    for module in (by_rows, whole):
        monkeypatch.setattr(module, "packed_linear", lambda *_, module=module: asked.append(module))
    with FakeTensorMode():
        for device in ("cpu", "cuda", "meta"):
            plain.packed_linear(torch.empty(1, 1, device=device), None, None)
    assert asked == [by_rows, whole, whole]


class Waits(Exception):
    pass


@pytest.mark.parametrize("make", ["factors, all", "factors, some", "values"])
@pytest.mark.parametrize("plan", PLANS)
def test_a_step_of_a_layer_reads_nothing_back(make, plan, monkeypatch):
    """What only a CPU may do for free is done when the mask changes, in the layer too."""
    mask = torch.tensor([[True, False, True], [False, False, False]])
    if make == "values":
        if PLANS[plan].is_factored:
            pytest.skip("works on factors")
        layer = BlockSparseLinear(12, 6, (3, 4), mask=mask, plan=plan)
    else:
        layer = KroneckerBlockLinear(12, 6, (3, 4), rank=2, plan=plan)
        layer.set_block_mask_(mask if make == "factors, some" else torch.ones_like(mask))
    x = torch.randn(5, 12, requires_grad=True)

    def waits(*_):
        raise Waits

    monkeypatch.setattr(backends, "pick", lambda tensor: plain)
    monkeypatch.setattr(plain, "_by", lambda tensor: whole)
    loaded = None if library.unavailable_reason() else library.load()
    with nullcontext() if loaded is None else loaded.aside(), monkeypatch.context() as patched:
        for name in ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy"):
            patched.setattr(Tensor, name, waits)
        with pytest.raises(Waits):
            bool(x[0, 0] > 0)
        y = layer(x)
        gradients = torch.autograd.grad(y, [x, *layer.parameters()], torch.ones_like(y))
    assert all(gradient.isfinite().all() for gradient in gradients)
