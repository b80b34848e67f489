"""The mixture of candidate block sizes: the sum of its parts, until one is left."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kronblocks import KronblocksError
from kronblocks.nn.mixture import BlockMixtureLinear
from kronblocks.ops import BlockSize

SIZES = {"2x2": BlockSize(2, 2), "4x2": BlockSize(4, 2), "4x8": BlockSize(4, 8)}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tile_groups", ["per-row", 1])
def test_output_and_gradients_are_those_of_the_summed_weights(bias, tile_groups):
    layer = BlockMixtureLinear(16, 8, SIZES, rank=3, tile_groups=tile_groups, bias=bias, dtype=torch.float64)
    assert [each.rank for each in layer.candidates.values()] == [3, 3, 3]
    x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    weights = [each.dense_weight() for each in layer.candidates.values()]
    assert torch.allclose(layer.weight, sum(weights), rtol=1e-12)
    wanted = nn.functional.linear(x, layer.weight, layer.bias)
    y = layer(input=x)
    assert torch.allclose(y, wanted, rtol=1e-10)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    got = torch.autograd.grad(y.pow(2).sum(), (x, *parameters))
    want = torch.autograd.grad(wanted.pow(2).sum(), (x, *parameters))
    for name, a, b in zip(("x", *names), got, want, strict=True):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-10), name


def test_the_start_has_the_variance_of_a_dense_layer():
    torch.manual_seed(0)
    layer = BlockMixtureLinear(256, 256, {"4": BlockSize(4, 4), "8": BlockSize(8, 8)}, rank=4)
    # 5%: 65,536 weights, of which neighbours share tiles
    assert layer.weight.detach().std().item() == pytest.approx((3 * 256) ** -0.5, rel=0.05)


def test_a_mixture_like_a_layer_has_its_variance_and_is_frozen_where_it_is():
    torch.manual_seed(0)
    linear = nn.Linear(256, 256)
    with torch.no_grad():
        linear.weight.mul_(3)
    linear.weight.requires_grad_(False)
    layer = BlockMixtureLinear.like(linear, {"4": BlockSize(4, 4), "8": BlockSize(8, 8)}, rank=4)
    wanted = linear.weight.norm().item() / 2**0.5
    assert list(layer.norms().values()) == pytest.approx([wanted, wanted], rel=1e-5)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["bias"]


def test_norms_scaling_removal_and_collapse():
    linear = nn.Linear(16, 8)
    layer = BlockMixtureLinear.like(linear, SIZES, rank=2).eval()
    assert layer.bias is linear.bias
    norms = layer.norms()
    for name, candidate in layer.candidates.items():
        assert norms[name] == pytest.approx(candidate.dense_weight().norm().item(), rel=1e-5)
    layer.scale_("2x2", 0.5)
    assert layer.norms()["2x2"] == pytest.approx(norms["2x2"] / 2, rel=1e-5)
    with pytest.raises(KronblocksError, match="3 candidates are left"):
        layer.collapse()
    gone = layer.remove_("2x2")
    assert {id(p) for p in gone}.isdisjoint({id(p) for p in layer.parameters()}) and len(gone) == 2
    layer.remove_("4x8")
    with pytest.raises(KronblocksError, match="no candidate is called '2x2'"):
        layer.remove_("2x2")
    with pytest.raises(KronblocksError, match="last candidate"):
        layer.remove_("4x2")
    x, last = torch.randn(3, 16), layer.candidates["4x2"]
    before = layer(x)
    collapsed = layer.collapse()
    assert collapsed is last and collapsed.bias is linear.bias
    assert torch.allclose(collapsed(x), before, atol=1e-6)  # the bias is added at another moment


def test_no_candidates_are_refused():
    with pytest.raises(KronblocksError, match="at least one"):
        BlockMixtureLinear(8, 8, {}, rank=1)
