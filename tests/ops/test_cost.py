"""Counts against independent counts of the code that runs, and the choice of a plan."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kronblocks import BlockSparseLinear, KronblocksError, KroneckerBlockLinear
from kronblocks.ops import BlockGrid, BlockIndex, BlockSize, backends
from kronblocks.ops.backends import native, triton
from kronblocks.ops.backends import torch as torch_backend
from kronblocks.ops.costs.choice import choose_plan
from kronblocks.ops.costs.counts import cost, estimated_seconds, intermediate_bytes
from kronblocks.ops.geometry import ConvGeometry, Convolution
from kronblocks.ops.kron import kron_linear
from kronblocks.ops.plans import PLAN_NAMES, PLANS, check_plan, possible_plans
from kronblocks.ops.problem import Problem

FACTORED = ("dense", "tile_first", "coeff_first")


def problem(grid=(4, 3), block=(3, 5), rank: int | None = 2, **rest) -> Problem:
    return Problem(BlockGrid(grid[0] * block[0], grid[1] * block[1], BlockSize(*block)), rank, **rest)


PROBLEMS = {
    "rectangular": problem(rows=7),
    "rank-above-rows": problem((2, 3), (5, 2), rank=3, rows=2),
    "groups": problem((6, 5), (2, 3), tile_groups=3, rows=11),
    "own-tiles": problem((5, 2), (3, 2), tile_groups=5, rows=6),
    "larger": problem((8, 6), (4, 7), rank=4, tile_groups=2, rows=33),
}


def tensors(p: Problem) -> list[torch.Tensor]:
    assert p.rank is not None
    (m1, n1), (bm, bn) = p.grid.shape, p.grid.block
    shapes = ((p.rows, n1 * bn), (m1, n1, p.rank), (p.tile_groups, p.rank, bm, bn))
    return [torch.randn(shape, requires_grad=k > 0 or p.input_grad) for k, shape in enumerate(shapes)]


def counted(function) -> int:
    """Multiply-adds of all matrix products in a call: PyTorch counts two operations for each."""
    with FlopCounterMode(display=False) as counter:
        function()
    assert counter.get_total_flops() % 2 == 0
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("input_grad", [True, False])
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("plan", FACTORED)
def test_multiply_adds_of_factored_plans(plan, name, input_grad):
    p = dataclasses.replace(PROBLEMS[name], input_grad=input_grad)
    x, coeff, tiles = tensors(p)
    with torch.no_grad():
        forward = counted(lambda: torch_backend.kron_linear(x, coeff, tiles, None, None, PLANS[plan]))
        dy = torch.ones(p.rows, p.grid.out_features)
        backward = counted(lambda: torch_backend.kron_backward(dy, x, coeff, tiles, None, PLANS[plan], input_grad))
    if plan == "tile_first" and p.tile_groups == p.grid.shape[0]:
        # with one block row a group, dZ sums over nothing: an elementwise product, which PyTorch's counter does not see
        (m1, n1), bm = p.grid.shape, p.grid.block.rows
        backward += p.rows * m1 * n1 * coeff.shape[2] * bm
    found = cost(p, plan)
    assert (found.forward_macs, found.backward_macs) == (forward, backward)
    outputs = []  # what PyTorch's counter is told of the opaque operators
    assert counted(lambda: outputs.append(kron_linear(x, coeff, tiles, plan=plan))) == forward
    assert counted(lambda: outputs[0].sum().backward()) == backward
    assert found.macs == forward + backward
    inference = cost(dataclasses.replace(p, training=False), plan)
    assert (inference.forward_macs, inference.backward_macs, inference.saved_bytes) == (forward, 0, 0)


@pytest.mark.parametrize("plan", ["tile_first", "coeff_first"])
def test_factored_plans_skip_dead_blocks_in_the_mixing(plan):
    """Of the two stages one runs over blocks, (4, 3) of them, and falls with the density; the other does not."""
    full, sparse = (cost(problem(rows=7, density=d), plan).forward_macs for d in (1.0, 1 / 4))
    mixing = 7 * 12 * 2 * {"tile_first": 3, "coeff_first": 5}[plan]
    assert full - sparse == mixing * 3 / 4


@pytest.mark.parametrize("input_grad", [True, False])
@pytest.mark.parametrize("live", [0, 1, 7, 12])
def test_multiply_adds_of_packed(live, input_grad):
    """By hand: 15 weights a block, each times rank 2 to be built and times 7 rows in each product, live blocks only."""
    p = problem(rows=7, density=live / 12, input_grad=input_grad)
    built, product = live * 15 * 2, live * 15 * 7
    assert cost(p, "packed").forward_macs == built + product
    # dvalues, and dx if wanted; dcoeff and dtiles
    assert cost(p, "packed").backward_macs == product * (1 + input_grad) + 2 * built
    free = dataclasses.replace(p, rank=None)
    assert cost(free, "packed").forward_macs == product
    assert cost(free, "packed").backward_macs == product * (1 + input_grad)


@pytest.mark.parametrize("input_grad", [True, False])
def test_multiply_adds_of_packed_by_counter(input_grad):
    """The operators are opaque, so the products inside them are counted."""
    p = problem(rows=7, density=7 / 12, input_grad=input_grad)
    mask = torch.tensor([[1, 0, 1], [1, 1, 1], [0, 0, 0], [0, 1, 1]], dtype=torch.bool)
    index = BlockIndex.from_mask(mask)
    x, coeff, tiles = tensors(p)
    x, coeff, tiles, dy = (t.detach() for t in (x, coeff, tiles, torch.randn(7, 12)))
    values = torch_backend.live_blocks(coeff, tiles, index)
    forward = counted(lambda: torch_backend.live_blocks(coeff, tiles, index))
    forward += counted(lambda: torch_backend.packed_linear(x, values, index))
    backward = counted(lambda: torch_backend.packed_grad_values(dy, x, index))
    backward += counted(lambda: torch_backend.live_blocks_backward(values, coeff, tiles, index))
    if input_grad:
        backward += counted(lambda: torch_backend.packed_grad_input(dy, values, index))
    assert (cost(p, "packed").forward_macs, cost(p, "packed").backward_macs) == (forward, backward)


def test_flop_counter_sees_packed_products():
    layer = BlockSparseLinear(15, 12, "3x5", plan="packed")
    assert counted(lambda: layer(torch.randn(7, 15))) == 7 * 12 * 15


@pytest.mark.parametrize("input_grad", [True, False])
def test_free_values_in_the_dense_plan(input_grad):
    p = problem(rank=None, rows=7, density=0.5, input_grad=input_grad)
    layer = BlockSparseLinear(15, 12, "3x5", plan="dense", bias=False)
    x = torch.randn(7, 15, requires_grad=input_grad)
    outputs = []
    assert cost(p, "dense").forward_macs == counted(lambda: outputs.append(layer(x)))
    assert cost(p, "dense").backward_macs == counted(lambda: outputs[0].sum().backward())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_parameters_of_kronecker_layers(groups, gate, dtype):
    layer = KroneckerBlockLinear(15, 12, "3x5", rank=3, tile_groups=groups, gate=gate, dtype=dtype)
    stored = [p for p in layer.parameters() if p is not layer.bias]
    for plan in PLAN_NAMES:
        found = cost(layer.problem(), plan)
        assert found.parameters == sum(p.numel() for p in stored)
        assert found.parameter_bytes == sum(p.numel() * p.element_size() for p in stored)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_of_free_values(dtype):
    mask = torch.tensor([[1, 0, 1], [1, 1, 1], [0, 0, 0], [0, 1, 1]], dtype=torch.bool)
    layer = BlockSparseLinear(15, 12, "3x5", mask=mask, dtype=dtype)
    found = cost(layer.problem(), "packed")
    assert found.parameters == layer.values.numel() == 7 * 15
    assert found.parameter_bytes == layer.values.numel() * layer.values.element_size()


@pytest.mark.parametrize("density", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("rank", [None, 1, 4, 40])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:1", "mps"])
def test_choice(device, training, rank, density):
    """A possible plan, the quickest by the estimate, the same each time, with a reason that names all of them."""
    p = problem((32, 24), (8, 4), rank=rank, rows=256, density=density, training=training, device=device)
    choice = choose_plan(p)
    assert choose_plan(p) == choice
    allowed = possible_plans(rank)
    assert set(allowed) == set(PLAN_NAMES if rank else ("dense", "packed"))
    assert choice.plan == min(allowed, key=lambda plan: estimated_seconds(p, plan))
    assert choice.backend == backends.expected(device, torch.float32).name
    assert choice.why.startswith(f"{choice.plan}: ")
    assert all(plan in choice.why for plan in allowed)
    assert f"{density:.2f}" in choice.why
    assert "256 rows" in choice.why
    assert choice.costs == {plan: cost(p, plan) for plan in allowed}


@pytest.mark.parametrize(
    ("grid", "block", "settings", "plans"),
    [
        # large blocks: 1/bm + 1/n1 of dense
        ((64, 64), (16, 16), {"rank": 1}, {"tile_first", "coeff_first"}),
        # more terms than the factored plans can bear: r/bm > 1
        ((256, 256), (4, 4), {"rank": 16}, {"dense", "packed"}),
        # nearly everything dead, and large blocks
        ((32, 32), (64, 64), {"rank": None, "density": 0.02, "rows": 8192}, {"packed"}),
    ],
)
def test_choices_that_are_clear(grid, block, settings, plans):
    assert choose_plan(problem(grid, block, **settings)).plan in plans


def test_without_native_kernels_packed_wants_many_zeros(monkeypatch):
    """Nothing dead: PyTorch's packed plan would do dense's work in small pieces."""
    monkeypatch.setattr(backends, "expected", lambda device, dtype: torch_backend)
    dead = problem((64, 64), (16, 16), rank=None, density=1.0)
    assert estimated_seconds(dead, "dense") < estimated_seconds(dead, "packed")
    assert intermediate_bytes(problem(rank=2), "coeff_first") > 0


def test_native_kernels_keep_the_intermediate_in_cache(monkeypatch):
    monkeypatch.setattr(backends, "expected", lambda device, dtype: native)
    assert intermediate_bytes(problem(rank=2), "coeff_first") == intermediate_bytes(problem(rank=2), "tile_first") == 0
    assert intermediate_bytes(problem(rank=2), "dense") == 12 * 15 * 4


def on_triton(monkeypatch, block, **settings) -> Problem:
    """4096x4096 on a GPU, 20,000 rows."""
    monkeypatch.setattr(backends, "expected", lambda device, dtype: triton)
    grid = 4096 // block[0], 4096 // block[1]
    return problem(grid, block, **{"rows": 20_000, "device": "cuda", "dtype": torch.bfloat16, **settings})


def test_triton_keeps_the_intermediate_on_chip(monkeypatch):
    p = on_triton(monkeypatch, (64, 64), rank=4)
    assert intermediate_bytes(p, "coeff_first") == intermediate_bytes(p, "tile_first") == 0
    assert intermediate_bytes(p, "dense") == 2 * 4096**2


@pytest.mark.parametrize(
    ("block", "settings", "plans"),
    [
        ((64, 64), {"rank": 4}, {"tile_first", "coeff_first"}),
        ((8, 8), {"rank": 1, "dtype": torch.float32}, {"tile_first", "coeff_first"}),
        ((64, 64), {"rank": None, "density": 0.1}, {"packed"}),
        # W is built for blocks that tensor cores cannot take, so nothing is won by skipping zeros
        ((4, 4), {"rank": None, "density": 0.1}, {"dense"}),
    ],
)
def test_choices_on_a_gpu(monkeypatch, block, settings, plans):
    p = on_triton(monkeypatch, block, **settings)
    assert choose_plan(p).plan in plans


def test_launches_decide_about_small_layers_on_a_gpu(monkeypatch):
    monkeypatch.setattr(backends, "expected", lambda device, dtype: triton)
    for rows, plans in ((64, {"dense"}), (20_000, {"tile_first", "coeff_first"})):
        assert choose_plan(problem((64, 64), (8, 8), rank=4, rows=rows, device="cuda")).plan in plans


def test_choice_without_rows():
    assert choose_plan(problem(rows=0)).plan in PLAN_NAMES


def test_precision_of_float32_counts(monkeypatch):
    """Products that a GPU takes on tensor cores are quicker; the choice follows the setting of now."""
    p = problem(rank=None, rows=20_000, device="cuda")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        exact = estimated_seconds(p, "dense")
        torch.set_float32_matmul_precision("high")
        assert estimated_seconds(p, "dense") < exact
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.fp32_precision = "tf32"  # after which torch.get_float32_matmul_precision raises
        assert estimated_seconds(p, "dense") < exact
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("plan", ["tile_first", "coeff_first"])
def test_free_values_have_no_factored_plans(plan):
    with pytest.raises(KronblocksError, match=f"plan '{plan}' works on factors.*write one of dense, packed"):
        cost(problem(rank=None), plan)
    with pytest.raises(KronblocksError, match=f"plan '{plan}' works on factors.*write one of auto, dense, packed"):
        check_plan(plan, None)


@pytest.mark.parametrize("plan", ["sparse", "", "auto"])
def test_unknown_plans(plan):
    with pytest.raises(KronblocksError, match="is unknown: write one of dense, tile_first, coeff_first, packed"):
        cost(problem(), plan)
    if plan != "auto":
        with pytest.raises(KronblocksError, match="is unknown: write one of auto, dense, tile_first, coeff_first, packed"):
            check_plan(plan, 2)


def test_plans_that_pass():
    for plan in ("auto", *PLAN_NAMES):
        check_plan(plan, 3)
    for plan in ("auto", "dense", "packed"):
        check_plan(plan, None)


def test_convolutions_move_images_and_not_patches_where_they_read_in_place():
    around = Convolution(ConvGeometry(3, 3, 1, 1, 1, 1), size=(7, 7))
    p = Problem(BlockGrid(32, 9 * 16, BlockSize(8, 16)), None, rows=2 * 49, density=0.5, convolution=around)
    image = 2 * 16 * 49 * 4
    assert cost(p, "packed").saved_bytes == cost(p, "dense").saved_bytes - 32 * 9 * 16 * 4 == image
    strided = dataclasses.replace(p, convolution=around._replace(stride=(2, 2)))
    wider = (
        2 * (16 * 13 * 13 // 49) * 49 * 4
    )  # the images of which every other pixel has a result, once; patches would be 9 images
    assert cost(strided, "packed").saved_bytes == wider
    assert cost(strided, "packed").moved_bytes >= cost(p, "packed").moved_bytes + 2 * wider
    assert cost(dataclasses.replace(p, convolution=None), "packed").macs == cost(p, "packed").macs
    assert estimated_seconds(p, "packed") < estimated_seconds(strided, "packed")
