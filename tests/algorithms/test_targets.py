"""Targets: scores out, multipliers in, exact zeros, no gradient for dead blocks, growth scores for them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from kronblocks import BlockSparseLinear, KronblocksError, KroneckerBlockLinear
from kronblocks.algorithms.balance import balanced
from kronblocks.algorithms.masked import MaskedLinear
from kronblocks.algorithms.moments import restart_
from kronblocks.algorithms.protocol import has_blocks, has_plans
from kronblocks.algorithms.targets import BlockTarget
from kronblocks.core.errors import Diverged
from kronblocks.ops import BlockGrid, BlockSize


def kron() -> BlockTarget:
    return BlockTarget("layer", KroneckerBlockLinear(12, 8, (2, 3), 2, tile_groups=2, gate=True))


def free() -> BlockTarget:
    return BlockTarget("layer", BlockSparseLinear(12, 8, (2, 3)))


def dense() -> BlockTarget:
    return BlockTarget("layer", MaskedLinear(nn.Linear(12, 8), BlockGrid(8, 12, BlockSize(2, 3))))


kinds = pytest.mark.parametrize("make", [kron, free, dense])


def weight_of(target: BlockTarget) -> torch.Tensor:
    weight = target.module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.detach()


@kinds
def test_scores_are_block_norms_over_the_root_of_the_area(make):
    target = make()
    blocks = target.grid.to_blocks(weight_of(target).double())
    # 1e-5: fp32 norms of six values
    assert torch.allclose(target.scores().double(), blocks.square().mean((2, 3)).sqrt(), rtol=1e-5)


@kinds
def test_multipliers_scale_blocks_and_zero_kills(make):
    target = make()
    before = target.grid.to_blocks(weight_of(target)).clone()
    multipliers = torch.linspace(0.5, 2, 16).view(4, 4)
    multipliers[1, 2] = 0
    assert target.apply_(multipliers).died.nonzero().tolist() == [[1, 2]]
    after = target.grid.to_blocks(weight_of(target))
    assert torch.allclose(after, before * multipliers[..., None, None], atol=1e-6)  # fp32 rounding of products of order 1
    assert (after[1, 2] == 0).all() and not target.mask[1, 2] and int(target.mask.sum()) == 15


@kinds
def test_a_mask_leaves_live_values_as_they_are_and_does_what_multipliers_of_one_and_zero_do(make):
    torch.manual_seed(0)
    target = make()
    other = copy.deepcopy(target)
    for live in (torch.rand(4, 4) < 0.7, torch.rand(4, 4) < 0.4, torch.rand(4, 4) < 0.4):  # blocks die, and some come back
        before = target.mask.clone()
        change = target.apply_(live)
        assert torch.equal(change.died, before & ~live) and torch.equal(change.grown, ~before & live)
        assert all(map(torch.equal, change, other.apply_(live.float())))
        assert torch.equal(target.mask, live) and torch.equal(other.mask, live)
        state, expected = target.module.state_dict(), other.module.state_dict()
        assert all(torch.equal(state[name], expected[name]) for name in expected)
        assert not target.apply_(live).died.any()


@kinds
def test_what_algorithms_ask_of_a_layer(make):
    target = make()
    assert has_blocks(target.layer) and has_plans(target.layer) == (not target.is_plain)
    assert not has_blocks(nn.Linear(12, 8)) and not has_blocks(nn.Sequential(target.module))
    again = pickle.loads(pickle.dumps(target))  # noqa: S301
    assert again.module is not target.module and torch.equal(weight_of(again), weight_of(target))
    assert (again.layer.linear if again.is_plain else again.layer) is again.module
    with pytest.raises(KronblocksError, match=r"bool tensor of \(4, 4\), not torch.float32 \(4, 4\)"):
        target.layer.set_block_mask_(torch.ones(4, 4))


@kinds
def test_dead_blocks_get_no_gradient_and_come_back_to_zero(make):
    target = make()
    handles = target.hook_gradients()
    mask = torch.rand(4, 4) < 0.5
    mask[0, 0], mask[3, 1] = True, False
    target.layer.set_block_mask_(mask)
    optimizer = torch.optim.AdamW(target.module.parameters(), lr=0.1)
    for parameter in target.module.parameters():  # moments from before the death
        optimizer.state[parameter].update(
            step=torch.tensor(3.0), exp_avg=torch.randn_like(parameter), exp_avg_sq=torch.rand_like(parameter)
        )
    target.module(torch.randn(5, 12)).square().sum().backward()
    if target.is_plain:
        gradient = target.parameters()[0].grad
        assert gradient is not None
        assert (target.grid.to_blocks(gradient)[~mask] == 0).all() and (gradient != 0).any()
    elif isinstance(target.module, KroneckerBlockLinear):
        assert target.module.coeff.grad is not None and target.module.gate is not None
        assert (target.module.coeff.grad[~mask] == 0).all()
        assert target.module.gate.grad is not None and (target.module.gate.grad[~mask] == 0).all()
    optimizer.step()
    target.layer.enforce_zeros_()
    assert ((target.grid.to_blocks(weight_of(target)) != 0).flatten(2).any(2) == mask).all()
    for handle in handles:
        handle.remove()


@kinds
def test_growth_scores_are_the_dense_gradient_of_every_block_summed_over_microbatches(make):
    target = make()
    target.layer.set_block_mask_(torch.tensor([[True] * 4, [False] * 4, [True] * 4, [False] * 4]))
    target.start_probe()
    weight = weight_of(target).double().requires_grad_()
    bias = target.module.bias.detach().double()
    for _ in range(2):
        x = torch.randn(3, 5, 12)
        target.module(x).pow(3).sum().backward()
        nn.functional.linear(x.double(), weight, bias).pow(3).sum().backward()
    assert weight.grad is not None
    expected = target.grid.norms(weight.grad) / 6**0.5
    # 1e-4: fp32 sums over 30 rows of cubes
    assert torch.allclose(target.read_probe().double(), expected, rtol=1e-4)


@kinds
def test_blocks_that_grow_start_at_zero_with_new_moments_and_train(make):
    target = make()
    handles = target.hook_gradients()
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[1] = False
    target.layer.set_block_mask_(mask)
    optimizer = torch.optim.AdamW(target.module.parameters(), lr=0.1, weight_decay=0.0)
    for parameter in target.module.parameters():
        optimizer.state[parameter].update(
            step=torch.tensor(3.0), exp_avg=torch.ones_like(parameter), exp_avg_sq=torch.rand_like(parameter)
        )
    multipliers = mask.float()
    multipliers[0, 0], multipliers[2, 3] = 0, 0
    multipliers[1, 1], multipliers[1, 2] = 1, 1
    before = weight_of(target).clone()
    grown = ~target.mask & (multipliers != 0)
    died = mask & (multipliers == 0)
    assert all(map(torch.equal, target.apply_(multipliers), (died, grown)))
    squares = moments_by_block(target, optimizer, "exp_avg_sq")
    target.restart_moments_([optimizer], grown)
    assert torch.equal(target.mask, multipliers != 0)
    stayed = (target.mask & mask)[..., None, None]
    assert torch.equal(target.grid.to_blocks(weight_of(target)), target.grid.to_blocks(before) * stayed)
    others = target.mask & ~grown
    for name, blocks in moments_by_block(target, optimizer, "exp_avg").items():
        assert (blocks[grown] == 0).all() and (blocks[others] == 1).all(), name
    for name, blocks in moments_by_block(target, optimizer, "exp_avg_sq").items():
        assert torch.equal(blocks[others], squares[name][others]), name
        # 1e-5: fp32 mean of some sixty values
        assert torch.allclose(blocks[grown], squares[name][others].mean().expand_as(blocks[grown]), rtol=1e-5), name
    target.module(torch.randn(5, 12)).square().sum().backward()
    optimizer.step()
    target.layer.enforce_zeros_()
    assert ((target.grid.to_blocks(weight_of(target)) != 0).flatten(2).any(2) == target.mask).all()
    for handle in handles:
        handle.remove()


def moments_by_block(target, optimizer, moment):
    """A moment, as (m1, n1, ...), of the parameters that hold blocks one by one."""
    module = target.module
    if target.is_plain:
        return {"weight": target.grid.to_blocks(optimizer.state[module.weight][moment]).clone()}
    if isinstance(module, KroneckerBlockLinear):
        return {name: optimizer.state[module.get_parameter(name)][moment].clone() for name in ("coeff", "gate")}
    values = optimizer.state[module.values][moment]
    return {"values": values[module.block_position.argsort()].view(4, 4, 2, 3)}  # all sixteen blocks have a slot here


@pytest.mark.slow
@kinds
@pytest.mark.parametrize("amsgrad", [False, True])
def test_blocks_that_grow_late_take_no_larger_steps_than_others(make, amsgrad):
    """Second moments of zero, with Adam's correction of the bias over, make first steps of three times the rate."""
    torch.manual_seed(0)
    target = make()
    handles = target.hook_gradients()
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[1] = False
    target.layer.set_block_mask_(mask)
    optimizer = torch.optim.Adam(target.parameters(), lr=1e-3, amsgrad=amsgrad)
    x, y = torch.randn(64, 12), torch.randn(64, 8)

    def step():
        optimizer.zero_grad()
        nn.functional.mse_loss(target.module(x), y).backward()
        before = weight_of(target).clone()
        optimizer.step()
        target.layer.enforce_zeros_()
        return target.grid.norms(weight_of(target) - before)

    for _ in range(1500):  # so that Adam's correction is over
        step()
    target.apply_(torch.ones(4, 4))
    target.restart_moments_([optimizer], ~mask)
    moved = step()
    assert (moved[1] > 0).all()
    assert moved[1].max() < 1.5 * max(float(moved[mask].max()), 1e-3 * 6**0.5)
    for handle in handles:
        handle.remove()


def test_a_block_grows_into_the_slot_of_a_dead_one():
    mask = torch.tensor([[True, True, False, False]])
    layer = BlockSparseLinear(12, 2, (2, 3), mask=mask)
    target = BlockTarget("layer", layer)
    target.apply_(torch.tensor([[0.0, 1.0, 0.0, 1.0]]))
    assert layer.capacity == 2 and sorted(layer.block_position.tolist()) == [1, 3]
    with torch.no_grad():
        layer.values.fill_(1)
    assert layer.grid.to_blocks(layer.weight)[0].sum((1, 2)).tolist() == [0, 6, 0, 6]
    with pytest.raises(KronblocksError, match="3 live blocks do not fit into the 2 slots"):
        layer.set_block_mask_(torch.tensor([[True, True, True, False]]))


@kinds
def test_relative_scores_are_norms_relative_to_live_blocks_of_their_row_and_column(make):
    target = make()
    mask = torch.tensor([[True, True, False, True], [False] * 4, [True] * 4, [True] * 4])
    target.layer.set_block_mask_(mask)
    assert torch.allclose(target.scores("relative"), balanced(target.scores("norm"), mask))
    assert not target.scores("relative")[~mask].any()


@kinds
def test_taylor_scores_are_the_gradient_times_the_weight_of_each_block(make):
    target = make()
    target.layer.set_block_mask_(torch.tensor([[True] * 4, [False] * 4, [True] * 4, [True] * 4]))
    with pytest.raises(KronblocksError, match="no gradients"):
        target.scores("taylor")
    x = torch.randn(7, 12)
    target.module(x).pow(3).sum().backward()
    weight = weight_of(target).double().requires_grad_()
    nn.functional.linear(x.double(), weight, target.module.bias.detach().double()).pow(3).sum().backward()
    assert weight.grad is not None
    expected = target.grid.to_blocks(weight.detach() * weight.grad).sum((2, 3)).abs() / 6
    # 1e-4 of the largest: fp32 sums over 7 rows of cubes, of either sign
    assert torch.allclose(target.scores("taylor").double(), expected, rtol=1e-3, atol=1e-4 * float(expected.max()))


def test_a_probe_without_a_backward_pass_finds_no_growth():
    target = free()
    target.start_probe()
    assert target.read_probe().count_nonzero() == 0


def test_a_gradient_that_the_probe_did_not_see_is_an_error():
    target = free()
    target.start_probe()
    for parameter in target.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(KronblocksError, match="call the layer as a module"):
        target.read_probe()


def test_a_backward_pass_that_overflowed_is_left_out():
    target = free()
    x = torch.randn(5, target.module.in_features, dtype=target.parameters()[0].dtype)
    target.start_probe()
    target.module(x).sum().backward()
    expected = target.read_probe()
    target.start_probe()
    (target.module(x).sum() * float("inf")).backward()
    target.module(x).sum().backward()
    assert expected.any() and torch.equal(target.read_probe(), expected)


@kinds
def test_weights_that_are_not_finite_are_reported_by_name(make):
    target = make()
    with torch.no_grad():
        target.parameters()[0].view(-1)[0] = float("nan")
    with pytest.raises(Diverged, match=r"'layer'.*diverged"):
        target.scores()


def test_gate_scores_are_magnitudes_and_need_a_gate():
    target = kron()
    with torch.no_grad():
        target.gate.neg_()
    assert (target.scores("gate") == 1).all()
    with pytest.raises(KronblocksError, match="has no gate"):
        dense().scores("gate")


def test_restarted_moments_of_many_entries_in_half_precision():
    moment = torch.full((300, 300), 0.5, dtype=torch.float16)  # fp16 counts to 65,504
    moment[0] = 2.0
    first = torch.arange(300)[:, None] == 0
    restart_("exp_avg_sq", moment, moment, first, ~first)
    assert (moment == 0.5).all()


@pytest.mark.parametrize("kind", [torch.optim.Rprop, torch.optim.Adadelta, torch.optim.RMSprop, torch.optim.Adagrad])
def test_blocks_that_grow_take_steps_like_others_under_other_optimisers(kind):
    torch.manual_seed(0)
    target = free()
    optimizer = kind(target.parameters())
    x, y = torch.randn(64, 12), torch.randn(64, 8)
    grown = torch.zeros(4, 4, dtype=torch.bool)
    grown[1] = True

    def step():
        optimizer.zero_grad()
        nn.functional.mse_loss(target.module(x), y).backward()
        before = weight_of(target).clone()
        optimizer.step()
        return target.grid.norms(weight_of(target) - before)

    for _ in range(20):
        step()
    target.restart_moments_([optimizer], grown)
    moved = step()
    # not the thousandfold of a division by zero, nor the thousandth of a product with it
    assert 0.5 < moved[grown].mean() / moved[~grown].mean() < 5 and moved[grown].min() > 0
