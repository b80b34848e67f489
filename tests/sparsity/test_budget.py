"""The target is hit exactly, in the way the design defines."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kronblocks import KronblocksError
from kronblocks.sparsity.budget import blocks_to_kill, choose_dead, erdos_renyi, random_masks, strongest_masks

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
    # a live block may score below a dead one only if it is the best of its layer, or of its block row in the last one
    spared = [sorted(map(float, score[~d]))[:-1] for score, d in zip(scores, dead, strict=True)]
    alive = scores[-1].masked_fill(dead[-1], -1.0)
    spared[-1] = [s for row in alive.tolist() for s in sorted(each for each in row if each >= 0)[:-1]]
    in_rows = [float(s) for s in scores[-1].amax(1)]
    others = [s for s in killed if s not in in_rows] if bool(dead[-1].all(1).any()) else killed
    if others:
        assert all(s >= max(others) for layer in spared for s in layer)


def test_the_head_keeps_a_block_in_every_row_while_anything_else_is_left():
    body, head = 1 + torch.rand(6, 8), torch.rand(4, 5)  # every block of the head scores below every other one
    for scope in ("global", "layer"):
        dead = choose_dead([body, head], [4, 4], 0.75, scope)
        assert sum(int(d.sum()) for d in dead) == 51 and not bool(dead[1].all(1).any())
    best = [(row, int(head[row].argmax())) for row in range(4)]
    assert all(not bool(choose_dead([body, head], [4, 4], 0.9)[1][place]) for place in best)
    # another layer has no such rows
    assert bool(choose_dead([head, body], [4, 4], 0.5)[0].all(1).any())
    # and a sparsity that leaves too few blocks is reached all the same
    dead = choose_dead([body, head], [4, 4], 65 / 68)
    assert [int((~d).sum()) for d in dead] == [1, 2]


def test_live_rows_of_a_sparse_start():
    """As many live blocks in each layer as the distribution says, and none of the head's rows without one."""
    norms = [torch.rand(8, 8), torch.tensor([[9.0, 8.0, 7.0, 6.0], [0.5, 0.4, 0.3, 0.2], [5.0, 4.0, 1.0, 1.0]])]
    for norm, rows in ((norms, [[1, 1, 1, 1], [1, 0, 0, 0], [1, 0, 0, 0]]), (norms[::-1], None)):
        masks = strongest_masks(norm, [4, 4], 0.5, "uniform")
        assert [int(mask.sum()) for mask in masks] == [each.numel() // 2 for each in norm]
        if rows is not None:
            assert masks[1].int().tolist() == rows
        else:
            assert not bool(masks[0].any(1)[1])  # not the head
    few = strongest_masks([norms[1]], [4], 10 / 12, "uniform")[0]
    assert int(few.sum()) == 2 and few.any(1).tolist() == [True, True, False]


def test_rows_of_the_head_that_are_dead_already_stay_out_of_the_count():
    head = torch.tensor([[2.0, 1.0, 3.0], [-1.0, -1.0, -1.0]])
    dead = choose_dead([head], [1], 0.5)[0]
    assert dead.tolist() == [[False, False, False], [True, True, True]]


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
