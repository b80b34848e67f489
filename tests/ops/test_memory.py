"""What autograd keeps from forward to backward, in bytes, against `cost(...).saved_bytes`."""

import pytest
import torch

from kronblocks import BlockSparseLinear, KroneckerBlockLinear
from kronblocks.ops import BlockGrid, BlockIndex, BlockSize
from kronblocks.ops.costs.counts import cost
from kronblocks.ops.kron import kron_linear
from kronblocks.ops.problem import Problem

FACTORED = ("dense", "tile_first", "coeff_first")
GRID, ROWS, RANK = BlockGrid(12, 15, BlockSize(3, 5)), 70, 2
LIVE = torch.tensor([[1, 0, 1], [1, 1, 1], [0, 0, 0], [0, 1, 1]], dtype=torch.bool)


def kept_bytes(function, *parameters: torch.Tensor) -> int:
    """Bytes of the different floating point memories that autograd keeps, the parameters' own not counted."""
    kept: dict[int, int] = {}
    tensors = []  # alive, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point():
            tensors.append(tensor)
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        tensors.append(function())
    for parameter in parameters:
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def factors(groups: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """x, coeff, tiles."""
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in ((ROWS, 15), (4, 3, RANK), (groups, RANK, 3, 5))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("plan", FACTORED)
def test_factored_plans_keep_x_only(plan, groups, dtype):
    x, coeff, tiles = factors(groups, dtype)
    kept = kept_bytes(lambda: kron_linear(x, coeff, tiles, plan=plan), coeff, tiles)
    assert kept == ROWS * 15 * dtype.itemsize
    assert kept == cost(Problem(GRID, RANK, groups, ROWS, dtype=dtype), plan).saved_bytes


@pytest.mark.parametrize("plan", FACTORED)
def test_a_mask_keeps_nothing_more(plan):
    x, coeff, tiles = factors(2)
    kept = kept_bytes(lambda: kron_linear(x, coeff, tiles, plan=plan, live=LIVE), coeff, tiles)
    assert kept == ROWS * 15 * 4


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_packed_keeps_x_and_values(groups):
    """And the gathered coefficients, r numbers a block against its 15 weights."""
    x, coeff, tiles = factors(groups)
    index = BlockIndex.from_mask(LIVE)
    kept = kept_bytes(lambda: kron_linear(x, coeff, tiles, plan="packed", live=index), coeff, tiles)
    expected = cost(Problem(GRID, RANK, groups, ROWS, density=7 / 12), "packed").saved_bytes
    assert expected == (ROWS * 15 + 7 * 15) * 4
    assert expected <= kept <= expected + 7 * RANK * 4


def test_free_values_packed_keep_x_only():
    layer = BlockSparseLinear(15, 12, "3x5", mask=LIVE, plan="packed")
    x = torch.randn(ROWS, 15, requires_grad=True)
    kept = kept_bytes(lambda: layer(x), *layer.parameters())
    assert kept == cost(layer.problem(rows=ROWS), "packed").saved_bytes == ROWS * 15 * 4


@pytest.mark.parametrize("input_grad", [True, False])
def test_free_values_dense(input_grad):
    """F.linear keeps the built W for dx only."""
    layer = BlockSparseLinear(15, 12, "3x5", mask=LIVE, plan="dense")
    x = torch.randn(ROWS, 15, requires_grad=input_grad)
    kept = kept_bytes(lambda: layer(x), *layer.parameters())
    expected = cost(layer.problem(rows=ROWS, input_grad=input_grad), "dense").saved_bytes
    assert expected <= kept <= expected + layer.values.numel() * 4  # and the values with dead slots masked


@pytest.mark.parametrize("plan", FACTORED)
def test_layers_keep_no_more(plan):
    layer = KroneckerBlockLinear(15, 12, "3x5", RANK, plan=plan)
    x = torch.randn(ROWS, 15, requires_grad=True)
    kept = kept_bytes(lambda: layer(x), *layer.parameters())
    assert kept == cost(layer.problem(rows=ROWS), plan).saved_bytes


def test_nothing_is_kept_without_gradients():
    x, coeff, tiles = (t.detach() for t in factors(2))
    for plan in FACTORED:
        assert kept_bytes(lambda plan=plan: kron_linear(x, coeff, tiles, plan=plan)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("plan", FACTORED)
def test_compiled_plans_keep_x_only(plan):
    x, coeff, tiles = factors(1)
    torch.compiler.reset()
    function = torch.compile(lambda x, coeff, tiles: kron_linear(x, coeff, tiles, plan=plan), fullgraph=True, backend="aot_eager")
    function(x, coeff, tiles)
    # x once, in any layout; the factors and their layouts are small beside it
    assert kept_bytes(lambda: function(x, coeff, tiles), coeff, tiles) < 1.5 * ROWS * 15 * 4
