"""The target is hit exactly, in the way the design defines."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kronblocks import KronblocksError
from kronblocks.sparsity.budget import blocks_to_kill, choose_dead, erdos_renyi, random_masks

shapes = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4)


@settings(deadline=None)
@given(shapes, st.integers(0, 99), st.randoms(use_true_random=False))
def test_equal_blocks_give_the_exact_count_and_the_least_scores(sizes, percent, random):
    scores = [torch.tensor([[random.choice((0.0, 0.5, 1.0, 2.0)) for _ in range(n)] for _ in range(m)]) for m, n in sizes]
    total, sparsity = sum(score.numel() for score in scores), percent / 100
    wanted = math.ceil(sparsity * total - 1e-9)
    if wanted > total - len(scores):
        with pytest.raises(KronblocksError, match="without a live block"):
            choose_dead(scores, [4] * len(scores), sparsity)
        return
    dead = choose_dead(scores, [4] * len(scores), sparsity)
    assert sum(int(d.sum()) for d in dead) == wanted
    assert all(not bool(d.all()) for d in dead)
    killed = [float(s) for score, d in zip(scores, dead, strict=True) for s in score[d]]
    # a live block may score below a dead one only if it is the best of its layer
    spared = [sorted(map(float, score[~d]))[:-1] for score, d in zip(scores, dead, strict=True)]
    if killed:
        assert all(s >= max(killed) for layer in spared for s in layer)


def test_ties_go_by_layer_order_then_block_index():
    dead = choose_dead([torch.ones(2, 2), torch.ones(1, 4)], [1, 1], 0.5)
    # the first of each layer is its "best" and is kept; of the rest the earliest four die
    assert dead[0].flatten().tolist() == [False, True, True, True]
    assert dead[1].flatten().tolist() == [False, True, False, False]


def test_unequal_blocks_kill_the_fewest_that_reach_the_share_of_weights():
    scores = [torch.tensor([[9.0, 1.0, 2.0]]), torch.tensor([[9.0, 3.0, 4.0]])]
    # areas 4 and 1: 15 weights; 9 of them are reached by blocks of score 1 (4), 2 (8), 3 (9)
    dead = choose_dead(scores, [4, 1], 9 / 15)
    assert [d.tolist() for d in dead] == [[[False, True, True]], [[False, True, False]]]
    dead = choose_dead(scores, [4, 1], 8 / 15)
    assert [d.tolist() for d in dead] == [[[False, True, True]], [[False, False, False]]]


def test_layer_scope_gives_each_layer_the_same_share():
    dead = choose_dead([torch.rand(10, 10), 100 + torch.rand(4, 5)], [1, 9], 0.75, "layer")
    assert [int(d.sum()) for d in dead] == [75, 15]


@given(st.integers(1, 10_000), st.integers(0, 100))
def test_rounding_errors_of_the_product_do_not_cost_a_block(blocks, percent):
    exact = -(-blocks * percent // 100)
    assert blocks_to_kill(blocks, percent / 100) == exact


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=4), st.floats(0.05, 1.0))
def test_erdos_renyi_densities_give_the_wanted_one_and_favour_small_layers(shapes, density):
    weights = [m1 * n1 for m1, n1 in shapes]
    found = erdos_renyi(shapes, weights, density)
    assert all(0 < each <= 1 for each in found)
    assert sum(d * w for d, w in zip(found, weights, strict=True)) == pytest.approx(density * sum(weights))
    raw = [(m1 + n1) / (m1 * n1) for m1, n1 in shapes]
    ranked = [d for _, d in sorted(zip(raw, found, strict=True))]
    assert all(small <= large + 1e-12 for small, large in itertools.pairwise(ranked))  # 1e-12: rounding of equal densities


@pytest.mark.parametrize("distribution", ["erk", "uniform"])
def test_random_masks_hit_the_sparsity_exactly_with_the_densities_asked_for(distribution):
    shapes, areas = [(16, 49), (16, 32), (5, 16)], [256, 256, 32]
    masks = random_masks(shapes, areas, 0.9, distribution)
    live = sum(int(mask.sum()) * area for mask, area in zip(masks, areas, strict=True))
    total = sum(mask.numel() * area for mask, area in zip(masks, areas, strict=True))
    assert 0.1 * total - max(areas) < live <= 0.1 * total
    blocks = [mask.numel() for mask in masks]
    weights = [number * area for number, area in zip(blocks, areas, strict=True)]
    wanted = erdos_renyi(shapes, weights, 0.1) if distribution == "erk" else [0.1] * 3
    for mask, number, density in zip(masks, blocks, wanted, strict=True):
        assert abs(int(mask.sum()) - density * number) <= 1.5  # rounding of one layer, and what rounding of the others leaves
    assert not all(torch.equal(a, b) for a, b in zip(masks, random_masks(shapes, areas, 0.9, distribution), strict=True))
