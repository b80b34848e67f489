"""`KroneckerBlockLinear`: initial scale, from_linear, gate, what it refuses."""

import copy
import math

import pytest
import torch
from torch import nn

from kronblocks import KronblocksError, KroneckerBlockLinear
from kronblocks.ops import reference
from kronblocks.ops.nearest import nearest_kronecker_sum
from kronblocks.ops.pattern import without_dead


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize(
    ("sizes", "block", "rank", "groups"),
    [
        ((192, 96), "4x8", 4, 1),
        ((192, 96), "16x4", 3, 2),
        ((96, 128), (2, 2), 4, 48),
        ((96, 128), "1x2", 6, 2),
        ((90, 70), (9, 7), 1, 1),
    ],
)
def test_initial_variance(sizes, block, rank, groups, gate):
    """Mean square of W near 1/(3n), nn.Linear's, for ranks below, at and above the block's area (equation 13).

    |W_pq|^2 = u^T G u with normal u of variance s^2 and G the tiles' Gram matrix has the variance 2 s^4 |G|^2; over independent
    blocks the relative standard deviation of the mean is sqrt(2 sum |G|^2) / sum trace(G). Five of them are allowed.
    """
    out_features, in_features = sizes
    layer = KroneckerBlockLinear(in_features, out_features, block, rank, tile_groups=groups, gate=gate)
    flat = layer.tiles.detach().flatten(2)
    gram = flat @ flat.transpose(1, 2)  # (g, r, r), shared by blocks/g blocks
    deviation = math.sqrt(2 * float(gram.square().sum()) * groups / layer.grid.blocks) / float(
        gram.diagonal(dim1=1, dim2=2).sum()
    )
    mean_square = float(layer.weight.detach().square().mean()) * 3 * in_features
    assert mean_square == pytest.approx(1, abs=5 * deviation)
    assert deviation < 0.15, "the tolerance says something"
    # the mean of W is 0 within five times its own deviation; tiles repeat, so it is not that of independent weights
    shared = layer.tiles.detach().sum((2, 3)).square().sum(1).repeat_interleave(layer.grid.shape[0] // groups)
    spread = float(layer.coeff.detach().std()) * math.sqrt(float(shared.sum()) * layer.grid.shape[1]) / layer.grid.weights
    assert abs(float(layer.weight.detach().mean())) <= 5 * spread


@pytest.mark.parametrize("rank", [1, 4, 15])
def test_initial_tiles_are_orthonormal(rank):
    layer = KroneckerBlockLinear(30, 24, "3x5", rank, tile_groups=4)
    flat = layer.tiles.detach().flatten(2)
    # QR in fp32: a few units, 6e-8
    torch.testing.assert_close(flat @ flat.transpose(1, 2), torch.eye(rank).expand(4, rank, rank), rtol=0, atol=2e-6)


def test_initial_bias_and_reset():
    layer = KroneckerBlockLinear(15, 1200, "3x5", 2, gate=True)
    assert layer.bias is not None
    assert layer.gate is not None
    bound = 15**-0.5
    assert layer.bias.detach().abs().max() <= bound
    assert layer.bias.detach().abs().max() > 0.9 * bound  # 1200 uniform draws: missing the last tenth has chance 0.9**1200
    mask = torch.zeros_like(layer.block_mask)
    mask[0, 0] = True
    layer.set_block_mask_(mask)
    old = layer.tiles.detach().clone()
    layer.reset_parameters()
    assert layer.density == 1
    assert (layer.gate == 1).all()
    assert (layer.block_norms() > 0).all()
    assert not torch.equal(layer.tiles.detach(), old)


def test_seeds_repeat():
    layers = []
    for _ in range(2):
        torch.manual_seed(3)
        layers.append(KroneckerBlockLinear(15, 12, "3x5", 2))
    assert all(torch.equal(a, b) for a, b in zip(*(layer.parameters() for layer in layers), strict=True))


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("groups", "rank"), [(1, 12), (2, 6), (4, 3), (1, 15), (4, 5)])
def test_from_linear_is_exact_at_full_rank(groups, rank, bias, gate):
    linear = nn.Linear(15, 12, bias=bias, dtype=torch.float64)
    layer = KroneckerBlockLinear.from_linear(linear, block_size="3x5", rank=rank, tile_groups=groups, gate=gate)
    torch.testing.assert_close(layer.weight, linear.weight, rtol=0, atol=1e-14)  # SVD in float64 of weights below 1
    assert (layer.bias is None) == (not bias)
    if bias:
        assert torch.equal(layer.bias, linear.bias)  # type: ignore[arg-type]
        assert layer.bias is not linear.bias
    x = torch.randn(7, 15, dtype=torch.float64)
    torch.testing.assert_close(layer(x), linear(x), rtol=0, atol=1e-13)  # 15 such products
    assert (layer.gate is not None) == gate
    assert layer.density == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2])
def test_from_linear_is_the_nearest(groups, dtype):
    linear = nn.Linear(15, 12, dtype=dtype)
    layer = KroneckerBlockLinear.from_linear(linear, block_size="3x5", rank=2, tile_groups=groups)
    coeff, tiles, error = nearest_kronecker_sum(linear.weight, layer.grid, 2, tile_groups=groups)
    assert torch.equal(layer.coeff, coeff)
    assert torch.equal(layer.tiles, tiles)
    assert layer.coeff.dtype == dtype
    weight = linear.weight.detach().double()
    left = (reference.kron_weight(coeff.double(), tiles.double()) - weight).norm() / weight.norm()
    # rounding of the factors, 2**-8 in bf16, is small beside an error of about 1/2
    assert float(left) == pytest.approx(error, rel=0.02)


def test_from_linear_keeps_the_plan_and_learns():
    layer = KroneckerBlockLinear.from_linear(nn.Linear(15, 12), block_size="3x5", rank=2, plan="packed")
    assert layer.active_plan == "packed"
    layer(torch.randn(7, 15)).sum().backward()
    assert all(p.requires_grad and p.grad is not None for p in layer.parameters())


def test_from_linear_refuses():
    linear = nn.Linear(15, 12)
    with pytest.raises(KronblocksError, match="rank is the number of Kronecker terms, a whole number from 1 on, not 0"):
        KroneckerBlockLinear.from_linear(linear, block_size="3x5", rank=0)
    with pytest.raises(KronblocksError, match="tile_groups must divide the 4 block rows, and 3 does not"):
        KroneckerBlockLinear.from_linear(linear, block_size="3x5", rank=2, tile_groups=3)
    with pytest.raises(KronblocksError, match=r"block_size='3x5'"):
        KroneckerBlockLinear.from_linear(linear, block_size="9x5", rank=2)
    with pytest.raises(KronblocksError, match="is unknown"):
        KroneckerBlockLinear.from_linear(linear, block_size="3x5", rank=2, plan="svd")
    nn.init.constant_(linear.weight, torch.nan)
    with pytest.raises(KronblocksError, match="not finite"):
        KroneckerBlockLinear.from_linear(linear, block_size="3x5", rank=2)


def test_from_linear_keeps_the_training_flag():
    assert not KroneckerBlockLinear.from_linear(nn.Linear(15, 12).eval(), block_size="3x5", rank=2).training


@pytest.mark.parametrize("rank", [0, -1, 1.0, True, None, "2"])
def test_refuses_ranks(rank):
    with pytest.raises(KronblocksError, match="rank is the number of Kronecker terms"):
        KroneckerBlockLinear(15, 12, "3x5", rank)


@pytest.mark.parametrize("groups", [0, -1, 3, 8, 2.0, True, None])
def test_refuses_tile_groups(groups):
    with pytest.raises(KronblocksError, match="tile_groups must divide the 4 block rows"):
        KroneckerBlockLinear(15, 12, "3x5", 2, tile_groups=groups)


@pytest.mark.parametrize("gate", [False, True])
def test_match_variance(gate):
    """The truncated SVD of a random weight has too little; afterwards the mean square is 1/(3n), exactly but for rounding."""
    linear = nn.Linear(64, 48)
    layer = KroneckerBlockLinear.from_linear(linear, block_size=4, rank=2, gate=gate)
    assert float(layer.weight.detach().square().mean()) * 3 * 64 < 0.6
    tiles, direction = layer.tiles.detach().clone(), layer.weight.detach()
    layer.match_variance_()
    assert float(layer.weight.detach().square().mean()) * 3 * 64 == pytest.approx(1, rel=1e-5)  # fp32 sums of 3072 squares
    assert torch.equal(layer.tiles.detach(), tiles)
    cosine = nn.functional.cosine_similarity(layer.weight.detach().flatten(), direction.flatten(), dim=0)
    assert float(cosine) == pytest.approx(1, abs=1e-5)


def test_match_variance_of_another_weight():
    layer, weight = KroneckerBlockLinear(64, 48, 4, 2), 0.02 * torch.randn(48, 64)
    layer.match_variance_(weight)
    assert float(layer.weight.detach().square().mean()) == pytest.approx(float(weight.square().mean()), rel=1e-5)
    layer.match_variance_(torch.zeros(48, 64))
    assert float(layer.weight.detach().square().mean()) * 3 * 64 == pytest.approx(1, rel=1e-5)


def test_match_variance_of_a_zero_weight():
    layer = KroneckerBlockLinear(15, 12, "3x5", 2)
    nn.init.zeros_(layer.coeff)
    layer.match_variance_()
    assert (layer.coeff == 0).all()


def test_gate_multiplies_and_its_gradient():
    """dS is the sum over terms of A times the gradient of S * A; the gauge (equation 15) leaves W alone."""
    layer = KroneckerBlockLinear(15, 12, "3x5", 2, gate=True, dtype=torch.float64)
    assert layer.gate is not None
    nn.init.normal_(layer.gate)
    effective = layer.effective_coeff().detach().requires_grad_()
    x, dy = torch.randn(7, 15, dtype=torch.float64), torch.randn(7, 12, dtype=torch.float64)
    (wanted,) = torch.autograd.grad(reference.kron_linear(x, effective, layer.tiles.detach()), effective, dy)
    layer(x).backward(dy)
    assert layer.gate.grad is not None
    # 7*15*2 products in float64
    torch.testing.assert_close(layer.gate.grad, (wanted * layer.coeff.detach()).sum(2), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.coeff.grad, wanted * layer.gate.detach()[..., None], rtol=1e-12, atol=1e-12)
    weight = layer.weight.detach()
    with torch.no_grad():
        layer.gate.mul_(-4)
        layer.coeff.div_(-4)
    assert torch.equal(layer.weight.detach(), weight), "powers of two are exact"


def test_whether_all_blocks_live_is_known_without_asking_the_device():
    """Backends that want no such masks get none then, see tests/ops/test_backends.py."""
    layer = KroneckerBlockLinear(8, 12, (3, 2), rank=2)
    assert without_dead(layer.block_mask)
    assert without_dead(KroneckerBlockLinear.from_linear(nn.Linear(8, 12), block_size=(3, 2), rank=2).block_mask)
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[1, 2] = False
    layer.set_block_mask_(mask)
    other = KroneckerBlockLinear(8, 12, (3, 2), rank=2)
    other.load_state_dict(layer.state_dict())
    assert not any(without_dead(each.block_mask) for each in (layer, other, copy.deepcopy(other)))
    layer.set_block_mask_(torch.ones_like(mask))
    other.scale_blocks_(torch.ones(4, 4))
    assert without_dead(layer.block_mask) and not without_dead(other.block_mask)
    other.reset_parameters()
    assert without_dead(other.block_mask)
    other.block_mask[0, 0] = False
    assert not without_dead(other.block_mask), "written into by somebody else"
