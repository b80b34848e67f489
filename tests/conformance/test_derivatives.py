"""Derivatives by finite differences, the custom operators' contract with PyTorch, and outputs that are written in full."""

import functools
import itertools

import pytest
import torch
from tests.conformance.backends import BACKENDS, over
from torch.autograd import gradcheck, gradgradcheck

from kronblocks.ops.index import BlockIndex
from kronblocks.ops.kron import kron_linear
from kronblocks.ops.packed import packed_linear
from kronblocks.ops.plans import PLAN_NAMES

FACTORED = ("dense", "tile_first", "coeff_first")
GROUPS = (1, 2, 4)  # one bank of tiles, some, and one for each of the 4 block rows


def factors(groups: int, device: str, rows: int = 3) -> list[torch.Tensor]:
    """x, coeff, tiles, bias in float64, which finite differences need; a 4x2 grid of 2x3 blocks."""
    shapes = ((rows, 6), (4, 2, 2), (groups, 2, 2, 3), (8,))
    return [torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True) for shape in shapes]


def mask(kind: str, device: str) -> torch.Tensor:
    live = torch.tensor([[1, 0], [0, 0], [1, 1], [0, 1]], dtype=torch.bool, device=device)
    return torch.zeros_like(live) if kind == "all-dead" else live


@pytest.mark.slow
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("plan", PLAN_NAMES)
@pytest.mark.parametrize("backend", over([()]), indirect=True)
def test_first_and_second_derivatives(backend, plan, masked, groups):
    """gradcheck and gradgradcheck with their default tolerances, made for float64."""
    live = mask("some", backend.device) if masked or plan == "packed" else None

    def function(x, coeff, tiles, bias):
        return kron_linear(x, coeff, tiles, bias, plan=plan, live=live)

    inputs = factors(groups, backend.device)
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("kind", ("some", "all-dead"))
@pytest.mark.parametrize("padded", (False, True))
@pytest.mark.parametrize("backend", over([()]), indirect=True)
def test_packed_linear_derivatives(backend, padded, kind):
    live = mask(kind, backend.device)
    index = BlockIndex.from_mask(live, torch.randperm(8).to(backend.device) if padded else None)
    x, _, _, bias = factors(1, backend.device)
    values = torch.randn(len(index.slot), 2, 3, dtype=torch.float64, device=backend.device, requires_grad=True)

    def function(x, values, bias):
        return packed_linear(x, values, index, bias)

    assert gradcheck(function, (x, values, bias))
    assert gradgradcheck(function, (x, values, bias))


@pytest.mark.parametrize("backend", over([()]), indirect=True)
@pytest.mark.parametrize("wanted", (0, 1))
@pytest.mark.parametrize("name", ("packed_linear", "packed_grad_input", "packed_grad_values"))
def test_one_gradient_is_the_same_without_the_other(backend, name, wanted):
    """Each operator's two gradients, which are the others' products, asked for together and alone."""
    index = BlockIndex.from_mask(mask("some", backend.device))
    shapes = {
        "packed_linear": ((3, 6), (4, 2, 3)),
        "packed_grad_input": ((3, 8), (4, 2, 3)),
        "packed_grad_values": ((3, 8), (3, 6)),
    }
    tensors = [torch.randn(shape, dtype=torch.float64, device=backend.device) for shape in shapes[name]]
    results = []
    for required in ((True, True), (wanted == 0, wanted == 1)):
        leaves = [t.clone().requires_grad_(needed) for t, needed in zip(tensors, required, strict=True)]
        bias = (None,) if name == "packed_linear" else ()
        y = getattr(torch.ops.kronblocks, name)(*leaves, *bias, *index)
        y.square().sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == list(required)
        results.append(leaves[wanted].grad)
    assert torch.equal(*results)


# AOT dispatch takes seconds, and sees fake tensors and autograd's formulas only: it is tried with one backend, and of those that
# differ in several ways with some where each way comes up
QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")


def opcheck(backend, whole: bool):
    return functools.partial(torch.library.opcheck, **{} if backend.name == "torch" and whole else {"test_utils": QUICK})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "kind", "rows"),
    over(itertools.product(("some", "padded", "all-dead"), (3, 1, 0)), [("padded", 3)]),
    indirect=["backend"],
)
def test_custom_operators(backend, kind, rows):
    """Schema, autograd registration, fake tensors and AOT dispatch with dynamic shapes of all three."""
    check = opcheck(backend, whole=(kind, rows) in (("some", 1), ("padded", 3), ("all-dead", 0)))
    live = mask(kind, backend.device)
    index = BlockIndex.from_mask(live, torch.arange(8, device=backend.device) if kind == "padded" else None)
    factory = {"dtype": torch.float64, "device": backend.device, "requires_grad": True}
    x, dy = torch.randn(rows, 6, **factory), torch.randn(rows, 8, **factory)
    values = torch.randn(len(index.slot), 2, 3, **factory)
    operators = torch.ops.kronblocks
    bias = torch.randn(8, **factory)
    check(operators.packed_linear, (x, values, None, *index))
    check(operators.packed_linear, (x, values, bias, *index))
    check(operators.packed_grad_input, (dy, values, *index))
    check(operators.packed_grad_values, (dy, x, *index))
    _, coeff, tiles, _ = factors(2, backend.device)
    check(operators.live_blocks, (coeff, tiles, *index))
    check(operators.live_blocks_backward, (values, coeff, tiles, *index))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "plan", "masked", "rows"),
    over(itertools.product(FACTORED, (False, True), (3, 1, 0)), [(plan, True, 3) for plan in FACTORED]),
    indirect=["backend"],
)
def test_custom_operators_on_factors(backend, plan, masked, rows):
    x, coeff, tiles, bias = factors(2, backend.device, rows)
    live = mask("some", backend.device) if masked else None
    dy = torch.randn(rows, 8, dtype=torch.float64, device=backend.device, requires_grad=True)
    operators = torch.ops.kronblocks
    check = opcheck(backend, whole=FACTORED.index(plan) == (3, 1, 0).index(rows))
    check(operators.kron_linear, (x, coeff, tiles, bias, live, plan))
    check(operators.kron_linear, (x, coeff, tiles, None, live, plan))
    for input_grad in (True, False):  # AOT dispatch of second derivatives: once, below
        torch.library.opcheck(operators.kron_backward, (dy, x, coeff, tiles, live, plan, input_grad), test_utils=QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("backend", [BACKENDS[0].parameter()], indirect=True)
def test_second_derivatives_through_aot_dispatch(backend):
    x, coeff, tiles, _ = factors(2, backend.device)
    dy = torch.randn(3, 8, dtype=torch.float64, device=backend.device, requires_grad=True)
    live = mask("some", backend.device)
    torch.library.opcheck(torch.ops.kronblocks.kron_backward, (dy, x, coeff, tiles, live, "coeff_first", True))


@pytest.mark.parametrize(
    ("backend", "plan", "groups", "kind"),
    over(
        itertools.product(PLAN_NAMES, GROUPS, ("some", "all-dead")),
        itertools.product(PLAN_NAMES, (2,), ("some", "all-dead")),
    ),
    indirect=["backend"],
)
def test_every_output_is_written(backend, poisoned, plan, groups, kind, with_gradients):
    *inputs, dy = *factors(groups, backend.device), torch.randn(3, 8, dtype=torch.float64, device=backend.device)
    live = mask(kind, backend.device)
    for tensor in with_gradients(lambda *t: kron_linear(*t, plan=plan, live=live), inputs, dy):
        assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("kind", ("some", "all-dead"))
def test_every_packed_output_is_written(backend, poisoned, kind, with_gradients):
    """Dead block rows of y, dead block columns of dx, unlisted slots of dvalues."""
    index = BlockIndex.from_mask(mask(kind, backend.device), torch.arange(8, device=backend.device))
    x, _, _, bias = factors(1, backend.device)
    values, dy = (torch.randn(s, dtype=torch.float64, device=backend.device) for s in ((8, 2, 3), (3, 8)))
    for tensor in with_gradients(lambda x, values, bias: packed_linear(x, values, index, bias), (x, values, bias), dy):
        assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("kind", ("values", "x"))
def test_dead_blocks_stop_nothing_but_themselves(backend, kind):
    """NaN in a dead slot, or in an x that only dead blocks read, does not reach the output."""
    live = torch.tensor([[1, 0], [1, 0], [1, 0], [0, 0]], dtype=torch.bool, device=backend.device)
    index = BlockIndex.from_mask(live, torch.arange(8, device=backend.device))
    bm, bn = backend.block
    x, values = torch.randn(3, 2 * bn, device=backend.device), torch.randn(8, bm, bn, device=backend.device)
    if kind == "values":
        values[~live.flatten()] = torch.nan
    elif backend.builds:
        pytest.skip("as a dense product, it multiplies zeros too")
    else:
        x[:, bn:] = torch.nan
    assert torch.isfinite(packed_linear(x, values, index)).all()
