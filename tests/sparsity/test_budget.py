"""The target is hit exactly, in the way the design defines."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kronblocks import KronblocksError
from kronblocks.sparsity.budget import blocks_to_kill, choose_dead

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
