"""The target is hit exactly, in the way the design defines."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kronblocks import KronblocksError
from kronblocks.algorithms.budget import FLOOR, blocks_to_kill, check_reachable, choose_dead, layer_adaptive
from kronblocks.algorithms.distribution import erdos_renyi, random_scores, strongest_masks


def random_masks(shapes, areas, sparsity, distribution):
    return strongest_masks([random_scores(shape) for shape in shapes], areas, sparsity, distribution)


shapes = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4)


@settings(deadline=None)
@given(shapes, st.integers(0, 99), st.booleans(), st.randoms(use_true_random=False))
def test_equal_blocks_give_the_exact_count_and_the_least_scores(sizes, percent, is_head, random):
    heads = [False] * (len(sizes) - 1) + [is_head]
    scores = [torch.tensor([[random.choice((0.0, 0.5, 1.0, 2.0)) for _ in range(n)] for _ in range(m)]) for m, n in sizes]
    total, sparsity = sum(score.numel() for score in scores), percent / 100
    wanted = math.ceil(sparsity * total - 1e-9)
    if wanted > total - len(scores):
        with pytest.raises(KronblocksError, match="without a live block"):
            choose_dead(scores, [4] * len(scores), sparsity, heads=heads)
        return
    dead = choose_dead(scores, [4] * len(scores), sparsity, heads=heads)
    assert sum(int(d.sum()) for d in dead) == wanted
    assert all(not bool(d.all()) for d in dead)
    killed = [float(s) for score, d in zip(scores, dead, strict=True) for s in score[d]]
    # a live block may score below a dead one only if it is the best of its layer, or of its block row in a head
    spared = [sorted(map(float, score[~d]))[:-1] for score, d in zip(scores, dead, strict=True)]
    alive = scores[-1].masked_fill(dead[-1], -1.0)
    if is_head:
        spared[-1] = [s for row in alive.tolist() for s in sorted(each for each in row if each >= 0)[:-1]]
    in_rows = [float(s) for s in scores[-1].amax(1)] if is_head else []
    others = [s for s in killed if s not in in_rows] if is_head and bool(dead[-1].all(1).any()) else killed
    if others:
        assert all(s >= max(others) for layer in spared for s in layer)


@settings(deadline=None)
@given(
    shapes,
    st.lists(st.sampled_from([1, 4, 9]), min_size=4, max_size=4),
    st.integers(0, 99),
    st.sampled_from(["global", "layer"]),
    st.integers(-1, 3),
)
def test_what_is_out_of_reach_is_known_without_scores(sizes, areas, percent, scope, empty):
    areas, sparsity = areas[: len(sizes)], percent / 100
    scores = [torch.full(shape, -1.0 if place == empty else 0.0) for place, shape in enumerate(sizes)]
    says = []
    for check in (
        lambda: choose_dead(scores, areas, sparsity, scope),
        lambda: check_reachable(sizes, areas, sparsity, scope, alive=[place != empty for place in range(len(sizes))]),
    ):
        try:
            check()
            says.append("")
        except KronblocksError as error:
            says.append(str(error))
    assert says[0] == says[1]


def test_the_head_keeps_a_block_in_every_row_while_anything_else_is_left():
    body, head = 1 + torch.rand(6, 8), torch.rand(4, 5)  # every block of the head scores below every other one
    for scope in ("global", "layer"):
        dead = choose_dead([body, head], [4, 4], 0.75, scope, heads=[False, True])
        assert sum(int(d.sum()) for d in dead) == 51 and not bool(dead[1].all(1).any())
    best = [(row, int(head[row].argmax())) for row in range(4)]
    assert all(not bool(choose_dead([body, head], [4, 4], 0.9, heads=[False, True])[1][place]) for place in best)
    # wherever it is among the layers, and another layer has no such rows
    assert not bool(choose_dead([head, body], [4, 4], 0.75, heads=[True, False])[0].all(1).any())
    assert bool(choose_dead([head, body], [4, 4], 0.5, heads=[False, True])[0].all(1).any())
    # and a sparsity that leaves too few blocks is reached all the same
    dead = choose_dead([body, head], [4, 4], 65 / 68, heads=[False, True])
    assert [int((~d).sum()) for d in dead] == [1, 2]


def test_live_rows_of_a_sparse_start():
    """As many live blocks in each layer as the distribution says, and none of the head's rows without one."""
    norms = [torch.rand(8, 8), torch.tensor([[9.0, 8.0, 7.0, 6.0], [0.5, 0.4, 0.3, 0.2], [5.0, 4.0, 1.0, 1.0]])]
    for heads in (None, [False, True], [True, False]):
        masks = strongest_masks(norms, [4, 4], 0.5, "uniform", heads)
        assert [int(mask.sum()) for mask in masks] == [32, 6]
        if heads == [True, False]:
            assert not bool(masks[1].any(1)[1])  # not the head
        else:  # nobody knows which is the head: each may be
            assert masks[1].int().tolist() == [[1, 1, 1, 1], [1, 0, 0, 0], [1, 0, 0, 0]]
    few = strongest_masks([norms[1]], [4], 10 / 12, "uniform", [True])[0]
    assert int(few.sum()) == 2 and few.any(1).tolist() == [True, True, False]


def test_rows_of_the_head_that_are_dead_already_stay_out_of_the_count():
    head = torch.tensor([[2.0, 1.0, 3.0], [-1.0, -1.0, -1.0]])
    dead = choose_dead([head], [1], 0.5, heads=[True])[0]
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


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 8), st.integers(1, 8)), min_size=1, max_size=4), st.integers(0, 2**31))
def test_adaptive_scores_are_those_of_the_formula_whatever_a_layers_scale(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.rand(shape, generator=generator, dtype=torch.float64) for shape in sizes]
    found = layer_adaptive(scores)
    for score, adapted in zip(scores, found, strict=True):
        squares = score.square()
        outlive = torch.stack([squares[score >= each].sum() for each in score.flatten()]).view(score.shape)
        assert torch.allclose(adapted, squares / outlive * sum(score.shape), rtol=1e-12)  # rounding of sums of 64 squares
        assert torch.equal(adapted.flatten().argsort(), score.flatten().argsort())
    for scale in (2.0**-500, 2.0**500):  # whose squares vanish and overflow; powers of two round nothing
        assert all(torch.equal(a, b) for a, b in zip(found, layer_adaptive([score * scale for score in scores]), strict=True))


def test_adaptive_scores_of_zeros_equal_blocks_and_dead_ones():
    zeros, equal = torch.zeros(4, 4), torch.full((4, 4), 3.0)
    assert torch.equal(*layer_adaptive([zeros, equal]))  # a layer that has learned nothing yet counts like any other
    assert torch.isfinite(layer_adaptive([zeros])[0]).all()
    partly = layer_adaptive([torch.tensor([[-1.0, 3.0, 0.0, 4.0]])])[0]
    assert partly.tolist() == [[-1.0, pytest.approx(5 * 9 / 25), 0.0, pytest.approx(5.0)]]
    # a cut through blocks that are all alike gives the densities of Erdos-Renyi
    shapes = [(16, 49), (16, 32), (5, 16)]
    dead = choose_dead(layer_adaptive([torch.ones(shape) for shape in shapes]), [1, 1, 1], 0.9)
    wanted = erdos_renyi(shapes, [m * n for m, n in shapes], 0.1)
    for grid, density in zip(dead, wanted, strict=True):
        assert abs(int((~grid).sum()) - density * grid.numel()) <= 1


@pytest.mark.parametrize("areas", [[4, 4, 4], [4, 1, 16]])
def test_every_layer_keeps_its_floor_and_the_budget_stays_exact(areas):
    scores = [torch.rand(10, 10), 1e-3 * torch.rand(10, 10), 1e3 * torch.rand(20, 10)]
    weights = sum(score.numel() * area for score, area in zip(scores, areas, strict=True))
    for sparsity in (0.3, 0.8, 0.95):
        free, kept = (choose_dead(scores, areas, sparsity, floor=floor) for floor in (0.0, FLOOR))
        dead = [sum(int(d.sum()) * area for d, area in zip(grids, areas, strict=True)) for grids in (free, kept)]
        assert all(sparsity * weights - 1e-6 <= each < sparsity * weights + max(areas) for each in dead)
        for score, grid in zip(scores, kept, strict=True):
            least = math.ceil(FLOOR * (1 - sparsity) * score.numel() - 1e-9)
            assert int((~grid).sum()) >= least
            assert not grid.any() or score[~grid].min() >= score[grid].max()  # the best stay
    assert int((~free[1]).sum()) == 1  # what happened without


def test_a_floor_gives_way_where_the_sparsity_needs_its_blocks():
    dead = choose_dead([torch.rand(1, 5) for _ in range(10)], [1] * 10, 0.8, floor=1.0)
    assert [int((~grid).sum()) for grid in dead] == [1] * 10
    with pytest.raises(KronblocksError, match="without a live block"):
        choose_dead([torch.rand(1, 5) for _ in range(10)], [1] * 10, 0.81, floor=1.0)
    dead = choose_dead([torch.rand(1, 5) for _ in range(10)], [1] * 10, 0.99, floor=1.0, reach=False)
    assert [int((~grid).sum()) for grid in dead] == [1] * 10


def test_no_layer_of_a_sparse_start_is_far_below_the_others():
    """Erdos-Renyi gives a layer much larger than the others hardly any blocks."""
    masks = random_masks([(64, 64), (4, 4), (4, 4)], [1, 256, 256], 0.8, "erk")
    assert all(float(mask.float().mean()) >= FLOOR * 0.2 for mask in masks)
    live = sum(int(mask.sum()) * area for mask, area in zip(masks, [1, 256, 256], strict=True))
    assert 0.2 * 12288 - 256 < live <= 0.2 * 12288


@pytest.mark.parametrize("areas", [(4, 4), (4, 9)])
def test_a_rounding_error_above_zero_kills_nothing(areas):
    scores = [torch.rand(3, 4), torch.rand(2, 5)]
    for sparsity, killed in ((0.0, 0), (1e-16, 0), (1e-12, 0), (1e-3, 1)):  # a share must be reached, so 1e-3 costs a block
        assert sum(int(dead.sum()) for dead in choose_dead(scores, areas, sparsity)) == killed
