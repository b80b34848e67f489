"""Candidates come from the layers' divisors; the shortlist drops what another beats."""

from __future__ import annotations

import pytest
import torch
from tests.search.small_task import convolutional, task
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from kronblocks import KronblocksError, SparsityConfig, sparsify_
from kronblocks.config import RankChoice
from kronblocks.nn.unfolded import UnfoldedConv
from kronblocks.ops import BlockGrid, BlockSize, nearest_kronecker_sum
from kronblocks.ops.nearest import captured_energy
from kronblocks.search.candidates import Candidate, excess_energy, find_candidates, shortlist, with_block


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, 10))


def test_sizes_are_taken_as_near_as_they_fit_and_those_that_make_no_difference_once():
    found = find_candidates(model(), SparsityConfig(rank=2, target_sparsity=0.5))
    assert [str(each.block) for each in found] == ["2x2", "4x4", "8x8", "16x16"]  # 32 and 64 give 8x16 and 2x8, as 16 does
    assert found[-1].sizes == {"0": "8x16", "2": "2x8"}
    assert [str(each.block) for each in find_candidates(model(), SparsityConfig(rank=2), (4, "8x2"))] == ["4x4", "8x2"]
    few = [str(each.block) for each in find_candidates(model(), SparsityConfig(rank=2, target_sparsity=0.9))]
    assert few == ["2x2", "4x4", "8x8"]  # of 9 and 15 blocks of 16x16, 0.9 would leave a layer without
    with pytest.raises(KronblocksError, match="none of the block sizes fits"):
        find_candidates(nn.Sequential(nn.Linear(7, 5)), SparsityConfig(), (4,))
    with pytest.raises(KronblocksError, match="none of the block sizes fits"):
        find_candidates(nn.Sequential(nn.Linear(7, 5)), SparsityConfig())
    with pytest.raises(KronblocksError, match="names no block size: a search needs at least two"):
        find_candidates(model(), SparsityConfig(), ())


def test_a_size_whose_factors_are_too_many_does_not_fit_and_the_others_do():
    layers = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))
    shared = {"tile_groups": 1, "init": "nearest", "target_sparsity": 0.5}
    found = find_candidates(layers, SparsityConfig(rank=RankChoice(max_parameters=0.2), **shared))
    assert [str(each.block) for each in found] == ["4x4", "8x8", "16x16"]  # one term of 2x2 has 0.25 of the weights
    assert all(layer.rank >= 1 for each in found for layer in each.layers)
    says = "none of the block sizes fits.*name others.*8x8: one Kronecker term in every layer has 208 parameters already"
    with pytest.raises(KronblocksError, match=says):
        find_candidates(layers, SparsityConfig(rank=RankChoice(max_parameters=0.01), **shared), (4, 8))


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("block", ["2x2", "4x8", "1x16"])
def test_energy_is_what_the_nearest_kronecker_sum_keeps(block, groups):
    weight = torch.randn(12, 32, dtype=torch.float64)
    grid = BlockGrid(12, 32, BlockSize.parse(block))
    _, _, error = nearest_kronecker_sum(weight, grid, 2, tile_groups=groups)
    assert captured_energy(weight, grid, 2, groups) == pytest.approx(1 - error**2, abs=1e-9)


def test_random_weights_have_no_energy_beyond_chance_and_structured_ones_all():
    torch.manual_seed(0)
    for block in ("2x2", "4x4", "16x16"):
        assert excess_energy(torch.randn(64, 128), BlockGrid(64, 128, BlockSize.parse(block)), 2, 4) < 0.03
    weight = torch.kron(torch.randn(16, 32), torch.randn(4, 4))
    assert excess_energy(weight, BlockGrid(64, 128, BlockSize(4, 4)), 1) > 0.999
    assert excess_energy(weight, BlockGrid(64, 128, BlockSize(8, 8)), 1) < 0.5


def candidate(side: int, seconds: float, energy: float) -> Candidate:
    return Candidate(BlockSize(side, side), (), {"0": seconds}, energy)


def test_shortlist_drops_what_another_beats_in_both_and_thins_the_rest():
    two, four, eight, sixteen = (
        candidate(2, 4.0, 0.9),
        candidate(4, 5.0, 0.5),
        candidate(8, 1.1, 0.4),
        candidate(16, 1.0, 0.1),
    )
    kept, reasons = shortlist([two, four, eight, sixteen], 4)
    assert kept == [two, eight, sixteen] and reasons.keys() == {"4x4"}
    assert reasons["4x4"].startswith("2x2 is estimated faster")
    kept, reasons = shortlist([two, four, eight, sixteen], 2)
    assert kept == [two, sixteen] and "nearly as fast as 16x16" in reasons["8x8"]


def test_where_no_usual_size_fits_the_divisors_are_candidates():
    config = SparsityConfig(rank=1, target_sparsity=0.5)
    assert [str(c.block) for c in find_candidates(nn.Sequential(nn.Linear(147, 63)), config)] == ["3x3", "7x7", "21x21"]
    assert [str(c.block) for c in find_candidates(nn.Sequential(nn.Linear(144, 48)), config)][:3] == ["2x2", "4x4", "8x8"]


def test_patterns_and_layers_are_those_of_sparsify_where_layers_are_unfolded():
    """Of GPT-2, whose layers are transformers' Conv1D, and of convolutions named by their type."""
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=16, n_layer=2, n_head=2))
    before = dict(gpt2.named_modules())
    config = SparsityConfig(rank=1, target_sparsity=0.5, layers=("type:Conv1D",), exclude=("*.c_fc",))
    (found,) = find_candidates(gpt2, config, (4,))
    wanted = [f"transformer.h.{block}.{name}.linear" for block in (0, 1) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")]
    assert [layer.name for layer in found.layers] == wanted and dict(gpt2.named_modules()) == before
    sparsifier = sparsify_(gpt2, with_block(config, found.block))
    assert [(target.name, target.grid) for target in sparsifier.targets] == [(each.name, each.grid) for each in found.layers]


def test_estimated_times_count_the_rows_that_reach_each_layer():
    net, seen = convolutional(), []
    config = SparsityConfig(rank=2, target_sparsity=0.75, convolutions=True)

    def rows(model: nn.Module):
        seen.append(task().rows(model, seed=0))
        return seen[-1]

    torch.manual_seed(3)
    (counted,) = find_candidates(net, config, (4,), rows=rows)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(3))) and net.training
    assert seen == [{"1.linear": 16 * 6, "3": 16}]  # batches of 16, and 6 places of the kernel
    assert not net[3]._forward_pre_hooks and isinstance(net[1], nn.Conv1d)
    few, many = (find_candidates(net, config, (4,), rows=number)[0].estimated_seconds for number in (16, 96))
    assert few < counted.estimated_seconds < many


def test_convolutions_are_candidates_where_they_are_wanted_and_stand_where_they_stood():
    conv = nn.Conv2d(4, 8, 3)
    net = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 16))
    config = SparsityConfig(rank=1, target_sparsity=0.5)
    assert [each.sizes for each in find_candidates(net, config, (2, 4))] == [{"4": "2x2"}, {"4": "4x4"}]
    found = find_candidates(net, SparsityConfig(rank=1, target_sparsity=0.5, convolutions=True), (2, 4, 8))
    assert [each.sizes for each in found] == [
        {"0.linear": "2x2", "4": "2x2"},
        {"0.linear": "4x4", "4": "4x4"},
        {"0.linear": "8x4", "4": "8x8"},  # no block across kernel positions
    ]
    assert net[0] is conv and not any(isinstance(module, UnfoldedConv) for module in net.modules())
    odd = nn.Sequential(nn.Conv2d(3, 5, 3))
    with pytest.raises(KronblocksError, match="none of the block sizes fits"):
        find_candidates(odd, SparsityConfig(convolutions=True), (4,))
    assert isinstance(odd[0], nn.Conv2d)
