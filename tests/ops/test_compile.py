"""fullgraph torch.compile of the operators, forward and backward. The backend of Inductor is slow to start: see tests/nn."""

import pytest
import torch

from kronblocks.ops import BlockIndex, kron_linear, packed_linear
from kronblocks.ops.plans import PLAN_NAMES

pytestmark = pytest.mark.slow

LIVE = torch.tensor([[1, 0, 1], [1, 1, 1], [0, 0, 0], [0, 1, 1]], dtype=torch.bool)
INDEX = BlockIndex.from_mask(LIVE)


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def assert_same(function, compiled, inputs, with_gradients) -> None:
    """float64, and aot_eager runs the same kernels; only sums of at most 40 products may be arranged otherwise."""
    dy = torch.randn(*inputs[0].shape[:-1], 12, dtype=torch.float64)
    for eager, other in zip(with_gradients(function, inputs, dy), with_gradients(compiled, inputs, dy), strict=True):
        torch.testing.assert_close(other, eager, rtol=1e-12, atol=1e-12)


def inputs(*leading: int, groups: int = 2) -> list[torch.Tensor]:
    shapes = ((*leading, 15), (4, 3, 2), (groups, 2, 3, 5), (12,))
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("plan", PLAN_NAMES)
def test_kron_linear(plan, masked, with_gradients):
    live = {True: LIVE, False: None}[masked] if plan != "packed" else INDEX

    def function(*t):
        return kron_linear(*t, plan=plan, live=live)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same(function, compiled, inputs(2, 3), with_gradients)


@pytest.mark.parametrize("plan", PLAN_NAMES)
def test_kron_linear_with_any_number_of_rows(plan, with_gradients):
    """One graph with dynamic rows serves all batches; recompiling would be an error."""

    def function(*t):
        return kron_linear(*t, plan=plan, live=INDEX if plan == "packed" else LIVE)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    assert_same(function, compiled, inputs(6), with_gradients)
    with torch.compiler.set_stance("fail_on_recompile"):
        for rows in (7, 13):
            assert_same(function, compiled, inputs(rows), with_gradients)


@pytest.mark.parametrize("padded", [False, True])
def test_packed_linear(padded, with_gradients):
    index = BlockIndex.from_mask(LIVE, torch.arange(12)) if padded else INDEX
    values = torch.randn(len(index.slot), 3, 5, dtype=torch.float64)
    x, _, _, bias = inputs(2, 3)

    def function(x, values, bias):
        return packed_linear(x, values, index, bias)

    assert_same(function, torch.compile(function, fullgraph=True, backend="aot_eager"), (x, values, bias), with_gradients)


def test_an_index_that_shrinks_does_not_recompile(with_gradients):
    """Deaths change an index of fixed capacity by its values only."""
    values, (x, _, _, bias) = torch.randn(12, 3, 5, dtype=torch.float64), inputs(4)

    compiled = torch.compile(packed_linear, fullgraph=True, backend="aot_eager")

    def check(index):
        assert_same(
            lambda x, values, bias: packed_linear(x, values, index, bias),
            lambda x, values, bias: compiled(x, values, index, bias),
            (x, values, bias),
            with_gradients,
        )

    dead = LIVE.clone()
    dead[0] = False
    first, *later = (BlockIndex.from_mask(mask, torch.arange(12)) for mask in (LIVE, dead, torch.zeros_like(LIVE)))
    check(first)
    with torch.compiler.set_stance("fail_on_recompile"):
        for index in later:
            check(index)
