"""What every layer does, whichever way it stores and multiplies its blocks."""

import copy

import pytest
import torch
from tests.helpers import config, mlp
from torch import Tensor, nn
from torch.nn.functional import linear

from kronblocks import KronblocksError, KroneckerBlockLinear, sparsify_
from kronblocks.nn.base import BlockLayer


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """float64, at most 12*7 products of size about 1 in the longest sum."""
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def block_gradients(layer) -> list[torch.Tensor]:
    """Gradients with one row per dead block, of all parameters that have such."""
    dead = ~layer.block_mask
    if isinstance(layer, KroneckerBlockLinear):
        return [p.grad[dead] for p in (layer.coeff, layer.gate) if p is not None and p.grad is not None]
    return [layer.values.grad[dead.flatten()[layer.block_position]]]


@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients(make, expected_weight, bias):
    layer = make.pruned(bias=bias, dtype=torch.float64)
    x, dy = torch.randn(7, 15, dtype=torch.float64, requires_grad=True), torch.randn(7, 12, dtype=torch.float64)
    expected = nn.functional.linear(x, expected_weight(layer), layer.bias)
    parameters = list(layer.parameters())
    assert len(parameters) == len(layer.block_parameters()) + bias
    wanted = torch.autograd.grad(expected, [x, *parameters], dy)
    y = layer(x)
    assert_close(y, expected)
    y.backward(dy)
    for got, want in zip([x, *parameters], wanted, strict=True):
        assert got.grad is not None
        assert_close(got.grad, want)
    assert all(gradients.numel() and (gradients == 0).all() for gradients in block_gradients(layer))


def test_dead_blocks_stay_zero_in_training(make, expected_weight):
    """Exact zeros through momentum and weight decay, with no more help than gradients of exactly 0."""
    layer = make.pruned()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    before = layer.dense_weight().detach()
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(7, 15)).square().mean().backward()
        optimizer.step()
    after = layer.dense_weight().detach()
    live = layer.grid.expand(layer.block_mask)
    assert (after[~live] == 0).all()
    assert (after[live] != before[live]).all()
    torch.testing.assert_close(after, expected_weight(layer))
    assert (layer.block_norms()[~layer.block_mask] == 0).all()


def test_weight_norms_and_density(make, expected_weight):
    layer = make.pruned(dtype=torch.float64)
    weight = expected_weight(layer)
    for built in (layer.weight, layer.dense_weight()):
        assert_close(built, weight)
        assert (built[~layer.grid.expand(layer.block_mask)] == 0).all()
        assert built.requires_grad
    assert_close(layer.block_norms(), layer.grid.norms(weight).detach())
    assert not layer.block_norms().requires_grad
    assert layer.density == 7 / 12


@pytest.mark.parametrize("leading", [(2, 3), (0,), (1,), (2, 0), (2, 1, 3)])
def test_leading_dimensions(make, leading):
    layer, x = make.pruned(), torch.randn(*leading, 15)
    y = layer(x)
    assert y.shape == (*leading, 12)
    # the same products in fp32; their number per matrix product may change the order of sums
    torch.testing.assert_close(y.reshape(-1, 12), layer(x.reshape(-1, 15)), rtol=1e-5, atol=1e-6)


def test_one_row_without_a_batch(make, request):
    layer, x = make(), torch.randn(15)
    assert torch.equal(layer(x), layer(x[None])[0])


def test_plans_agree(make, expected_weight):
    """Changing the plan changes neither the parameters nor, beyond rounding, the result."""
    layer, x = make.pruned(dtype=torch.float64), torch.randn(7, 15, dtype=torch.float64)
    expected = nn.functional.linear(x, expected_weight(layer), layer.bias)
    state = copy.deepcopy(layer.state_dict())
    for plan in make.plans:
        layer.use_plan_(plan)
        assert layer.active_plan == plan
        assert_close(layer(x), expected)
    assert layer.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())


def test_plans_are_fixed_or_chosen(make, make_any):
    layer = make()
    layer.choose_plan_(rows=5)
    assert (layer.plan, layer.active_plan, layer.rows) == (make.plan, make.plan, 5)
    auto = make_any()
    choice = auto.choose_plan_(rows=77)
    assert auto.active_plan == choice.plan
    assert "77 rows" in choice.why
    assert auto.choose_plan_().why == choice.why, "the rows are remembered"


def test_auto_follows_the_density(make_any):
    layer = make_any()
    before = layer.choose_plan_()
    layer.set_block_mask_(make_any.live)
    assert "density 1.00" in before.why
    assert "density 0.58" in layer.choose_plan_().why


def test_refused_plans(make_any):
    for plan in ("sparse", "", None, "Dense"):
        with pytest.raises(KronblocksError, match="is unknown: write one of auto, dense"):
            make_any(plan=plan)
        with pytest.raises(KronblocksError, match="is unknown: write one of auto, dense"):
            make_any().use_plan_(plan)
    if make_any.kind == "free":
        for plan in ("tile_first", "coeff_first"):
            with pytest.raises(
                KronblocksError, match="works on factors, not on free block values: write one of auto, dense, packed"
            ):
                make_any(plan=plan)


def test_refused_inputs(make, request):
    layer = make()
    with pytest.raises(KronblocksError, match="x has 14 features, but 3 block columns of 5 need 15"):
        layer(torch.randn(2, 14))
    with pytest.raises(KronblocksError, match=r"x is torch.float64.*autocast"):
        layer(torch.randn(2, 15, dtype=torch.float64))


def test_refused_sizes(make_any):
    with pytest.raises(KronblocksError, match=r"6x10 does not fit a weight of 12x15.*block_size='6x5'"):
        make_any.cls(15, 12, "6x10", **make_any.settings)
    with pytest.raises(KronblocksError, match="cannot read '3y5' as a block size"):
        make_any.cls(15, 12, "3y5", **make_any.settings)
    for sizes in ((0, 12), (15, -12), (15.0, 12), (True, 12)):
        with pytest.raises(KronblocksError, match="features must be a whole number"):
            make_any.cls(*sizes, "1", **make_any.settings)


def test_set_block_mask(make, expected_weight):
    """Blocks die at once and exactly; what comes alive starts at zero; the index follows."""
    layer, x = make(), torch.randn(7, 15)
    layer.set_block_mask_(make.live)
    assert torch.equal(layer.block_mask, make.live)
    dead = layer.dense_weight().detach().clone()
    assert (layer.block_norms()[~make.live] == 0).all()
    assert (layer.block_norms()[make.live] > 0).all()
    layer.set_block_mask_(torch.ones_like(make.live))
    assert torch.equal(layer.dense_weight().detach(), dead)
    assert layer.density == 1
    torch.testing.assert_close(layer(x), nn.functional.linear(x, expected_weight(layer), layer.bias), rtol=1e-5, atol=1e-5)


def test_set_block_mask_copies(make_any):
    layer, mask = make_any(), make_any.live.clone()
    layer.set_block_mask_(mask)
    mask.fill_(True)
    assert layer.density == 7 / 12


def test_a_block_that_comes_alive_can_grow(make, request):
    layer = make.pruned()
    layer.set_block_mask_(torch.ones_like(make.live))
    layer(torch.randn(7, 15)).square().sum().backward()
    with torch.no_grad():
        for parameter in layer.block_parameters():
            assert parameter.grad is not None
            parameter -= 0.1 * parameter.grad
    assert (layer.block_norms() > 0).all()


@pytest.mark.parametrize("mask", [torch.ones(4, 3), torch.ones(4, 3, dtype=torch.int), torch.ones(3, 4, dtype=torch.bool)])
def test_set_block_mask_refuses(make_any, mask):
    layer = make_any()
    with pytest.raises(KronblocksError, match=r"mask of 12x15 in 3x5 blocks is a bool tensor of \(4, 3\)"):
        layer.set_block_mask_(mask)
    assert layer.density == 1


@pytest.mark.parametrize("shape", [(1, 1), (12,), (4, 4), (8, 3)])
def test_set_block_mask_refuses_other_shapes(make_any, shape, request):
    with pytest.raises(KronblocksError, match=r"bool tensor of \(4, 3\)"):
        make_any().set_block_mask_(torch.ones(shape, dtype=torch.bool))


def test_scale_blocks(make, expected_weight):
    """W_pq becomes mu_pq W_pq; 0 kills; dead blocks stay dead."""
    layer = make.pruned(dtype=torch.float64)
    before = expected_weight(layer).detach()
    multipliers = torch.linspace(0.1, 1, 12).view(4, 3).double()
    multipliers[1] = torch.tensor([0.0, 1.0, 0.5])
    layer.scale_blocks_(multipliers)
    assert_close(layer.dense_weight().detach(), before * layer.grid.expand(multipliers))
    assert torch.equal(layer.block_mask, make.live & (multipliers != 0))
    x = torch.randn(7, 15, dtype=torch.float64)
    assert_close(layer(x), nn.functional.linear(x, expected_weight(layer), layer.bias))
    layer.scale_blocks_(torch.zeros(4, 3))
    assert layer.density == 0
    torch.testing.assert_close(layer(x), layer.bias.expand(7, 12), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(3,), (1, 3), (4, 1), (3, 4), ()])
def test_scale_blocks_refuses_shapes(make_any, shape):
    with pytest.raises(KronblocksError):
        make_any().scale_blocks_(torch.full(shape, 0.5))


def test_autocast(make):
    layer, x = make.pruned(), torch.randn(7, 15)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    # 15*3 products in bf16 (2**-8) of size about 1/4 beside fp32's
    torch.testing.assert_close(y.float(), layer(x), rtol=0.03, atol=0.03)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())
    assert all((gradients == 0).all() for gradients in block_gradients(layer))


def test_repr_names_blocks_and_plan(make):
    text = repr(make.pruned())
    assert "in_features=15, out_features=12, block_size=3x5" in text
    assert f"live=7/12, plan={make.plan}" in text
    assert "live=?/12" in repr(make(device="meta"))


@pytest.mark.parametrize("plan", ["dense", "tile_first", "coeff_first", "packed"])
def test_third_derivatives_as_in_the_loss_of_a_differential_equation(plan):
    model = mlp().double()
    sparsify_(model, config(layers=("2",)))
    layer = model[2]
    assert isinstance(layer, BlockLayer)
    mask = torch.rand(layer.grid.shape) < 0.5
    layer.set_block_mask_(mask)
    layer.use_plan_(plan)

    def gradients(product) -> list[Tensor]:
        x = torch.linspace(-1, 1, 3 * 32, dtype=torch.float64).view(3, 32).requires_grad_()
        y = model[4](model[3](product(model[1](model[0](x)))))
        first = torch.autograd.grad(y.sum(), x, create_graph=True)[0]
        second = torch.autograd.grad(first.sin().sum(), x, create_graph=True)[0]
        return list(torch.autograd.grad((second + x).square().mean(), [p for p in model.parameters() if p is not model[4].bias]))

    for found, wanted in zip(gradients(layer), gradients(lambda x: linear(x, layer.dense_weight(), layer.bias)), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12 * float(wanted.abs().max()))
