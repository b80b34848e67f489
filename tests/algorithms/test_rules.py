"""Rules are pure functions on grids: shrinking is the proximal operator, cutting is exact."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kronblocks.algorithms.balance import balanced
from kronblocks.algorithms.rules.base import RuleContext, cut, shrink
from kronblocks.algorithms.rules.fixed import Fixed
from kronblocks.algorithms.rules.group_lasso import GroupLasso
from kronblocks.algorithms.rules.kron_l1 import KronL1
from kronblocks.algorithms.rules.magnitude import Magnitude
from kronblocks.algorithms.rules.proximal import blocks_due, due_thresholds
from kronblocks.algorithms.rules.regrowth import exchange
from kronblocks.algorithms.rules.rigl import Rigl


def context(masks, **changes) -> RuleContext:
    settings = {
        "step": 10,
        "total_steps": 100,
        "phase": "discover",
        "sparsity": 0.5,
        "target_sparsity": 0.75,
        "fraction": 0.5,
        "is_update": True,
        "is_last_update": False,
        "next_sparsity": 0.75,
        "steps_to_update": 5,
        "masks": tuple(masks),
        "areas": (4,) * len(masks),
        "learning_rates": (0.1,) * len(masks),
    }
    return RuleContext(**{**settings, **changes})


@settings(deadline=None, max_examples=60)
@given(st.floats(0, 3), st.floats(0, 3), st.integers(0, 2**31))
def test_shrink_is_the_argmin_of_the_group_lasso_objective(norm, threshold, seed):
    """prox(w) minimises |v - w|^2 / 2 + t |v|, at zero too; checked against random competitors."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(6, dtype=torch.float64, generator=generator)
    block = norm * direction / direction.norm()
    mask = torch.ones(1, 3, dtype=torch.bool)
    scores = torch.tensor([[norm, 100.0, 200.0]], dtype=torch.float64)
    multipliers = shrink([scores], [threshold], context([mask]), 0.7)[0]
    assert torch.isfinite(multipliers).all()
    best = block * multipliers[0, 0]

    def objective(v):
        return 0.5 * (v - block).square().sum() + threshold * v.norm()

    competitors = [best + scale * torch.randn(6, dtype=torch.float64, generator=generator) for scale in (1e-3, 0.1, 1.0)]
    # 1e-12: float64 rounding of sums of six squares of size about 10
    assert all(objective(best) <= objective(v) + 1e-12 for v in [*competitors, torch.zeros_like(block), block])


def test_shrink_uses_each_layers_own_threshold():
    masks = [torch.ones(1, 2, dtype=torch.bool)] * 2
    scores = [torch.tensor([[2.0, 4.0]]), torch.tensor([[2.0, 4.0]])]
    first, second = shrink(scores, [0.5, 1.0], context(masks), 0.5)
    assert first.tolist() == [[0.75, 0.875]] and second.tolist() == [[0.5, 0.75]]


def test_shrink_without_a_threshold_brings_nothing_back():
    mask = torch.tensor([[True, False, True]])
    assert shrink([torch.tensor([[1.0, 0.0, 2.0]])], [0.0], context([mask]), 0.5)[0].tolist() == [[1.0, 0.0, 1.0]]


def test_shrink_never_kills_beyond_the_cap_nor_a_whole_layer():
    masks = [torch.ones(2, 5, dtype=torch.bool), torch.ones(1, 2, dtype=torch.bool)]
    scores = [torch.arange(1.0, 11.0).view(2, 5), torch.tensor([[0.1, 0.2]])]
    multipliers = shrink(scores, [100.0, 100.0], context(masks), 0.5)
    assert sum(int((m == 0).sum()) for m in multipliers) == 6
    assert all(bool(m.any()) for m in multipliers)
    assert multipliers[1].tolist() == [[0.0, 1.0]]


def test_cut_keeps_the_dead_dead():
    mask = torch.tensor([[True, False, True, True]])
    # the dead block's score is stale and large; it must still count as the first to die
    multipliers = cut([torch.tensor([[1.0, 9.0, 2.0, 3.0]])], context([mask]), 0.5)
    assert multipliers[0].tolist() == [[0.0, 0.0, 1.0, 1.0]]


def test_magnitude_kills_the_least_blocks_to_the_scheduled_sparsity():
    scores = [torch.tensor([[4.0, 1.0], [3.0, 2.0]])]
    mask = torch.ones(2, 2, dtype=torch.bool)
    multipliers, state = Magnitude().propose(scores, None, {}, context([mask]))
    assert multipliers[0].tolist() == [[1.0, 0.0], [1.0, 0.0]] and state == {}


def test_fixed_changes_nothing():
    mask = torch.tensor([[True, False]])
    multipliers, _ = Fixed().propose([torch.tensor([[0.0, 5.0]])], None, {}, context([mask]))
    assert multipliers[0].tolist() == [[1.0, 0.0]]


def test_group_lasso_shrinks_by_penalty_times_rate_and_cuts_exactly_at_the_end():
    rule = GroupLasso(strength=2.0)
    mask = torch.ones(1, 4, dtype=torch.bool)
    scores = [torch.tensor([[0.1, 1.0, 2.0, 4.0]])]
    multipliers, state = rule.propose(scores, None, {}, context([mask], is_update=False))
    # threshold = penalty 2 * rate 0.1
    assert torch.allclose(multipliers[0], torch.tensor([[0.0, 0.8, 0.9, 0.95]]))
    last, _ = rule.propose(scores, None, state, context([mask], is_last_update=True, sparsity=0.75))
    assert last[0].tolist() == [[0.0, 0.0, 0.0, 1.0]]


@settings(deadline=None, max_examples=60)
@given(st.floats(0.01, 3), st.floats(0, 3), st.floats(0, 3), st.integers(0, 2**31))
def test_elastic_shrink_is_the_argmin_of_its_objective(score, strength, ridge, seed):
    """prox(w) minimises |v - w|^2 / 2 + t |v| + t ridge |v|^2 / 2, in the units of a block with one weight."""
    mask = torch.ones(1, 3, dtype=torch.bool)
    scores = [torch.tensor([[score, 100.0, 200.0]], dtype=torch.float64)]
    rule = GroupLasso(strength=strength, ridge=ridge)
    ctx = context([mask], is_update=False, learning_rates=(1.0,))
    best = float(rule.propose(scores, None, {}, ctx)[0][0][0, 0]) * score

    def objective(v):
        return 0.5 * (v - score) ** 2 + strength * abs(v) + 0.5 * strength * ridge * v**2

    # 1e-9: float64 rounding near the minimum, where the objective is flat
    assert all(objective(best) <= objective(best + each) + 1e-9 for each in (-1.0, -1e-2, -1e-4, 1e-4, 1e-2, 1.0))


class FakeTarget:
    def __init__(self, norms, area):
        self._norms, self.area = norms, area
        self.grid = type("Grid", (), {"blocks": norms.numel()})

    def differentiable_norms(self):
        return self._norms


def test_group_lasso_in_the_loss_is_the_mean_score_and_cuts_only_at_the_end():
    first, second = torch.tensor([[2.0, 4.0]], requires_grad=True), torch.tensor([[9.0]], requires_grad=True)
    targets = [FakeTarget(first, 4), FakeTarget(second, 9)]
    masks = [torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 1, dtype=torch.bool)]
    plain, elastic = GroupLasso("gradient", 0.5), GroupLasso("gradient", 0.5, ridge=2.0)
    assert plain.has_penalty and not plain.every_step
    # scores 1, 2 and 3; half way to three times the strength
    assert plain.penalty(targets, context(masks, step=50)).item() == pytest.approx(0.5 * 2 * 6 / 3)
    assert elastic.penalty(targets, context(masks, step=50)).item() == pytest.approx(0.5 * 2 * (6 + 14) / 3)
    assert plain.penalty(targets, context(masks, phase="heal")) is None
    scores = [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]])]
    assert [m.tolist() for m in plain.propose(scores, None, {}, context(masks))[0]] == [[[1.0, 1.0]], [[1.0]]]
    last = plain.propose(scores, None, {}, context(masks, is_last_update=True, sparsity=1 / 3))[0]
    assert [m.tolist() for m in last] == [[[0.0, 1.0]], [[1.0]]]


def test_exchange_drops_the_least_and_grows_where_the_gradient_is_greatest():
    alive = torch.tensor([[True, True, True, True], [False, False, False, False]])
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0]])
    growth = torch.tensor([[0.0, 9.0, 0.0, 0.0], [1.0, 7.0, 2.0, 0.0]])
    start, half = context([alive], fraction=0.0), context([alive], fraction=0.5)
    # half of the four at first: 1 and 2 are dropped; of all outside, the second's own gradient is greatest, so it stays
    assert exchange([alive], [scores], [growth], 0.5, start)[0].tolist() == [
        [False, True, True, True],
        [False, True, False, False],
    ]
    # half way a quarter of them: 1 is dropped, and the dead block of greatest gradient comes
    assert exchange([alive], [scores], [growth], 0.5, half)[0].tolist() == [
        [False, True, True, True],
        [False, True, False, False],
    ]
    assert torch.equal(exchange([alive], [scores], [growth], 0.5, context([alive], fraction=1.0))[0], alive)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 6), st.integers(1, 6), st.floats(0, 0.99), st.floats(0, 1), st.integers(0, 2**31))
def test_exchange_keeps_every_layers_number_of_live_blocks(rows, cols, share, fraction, seed):
    generator = torch.Generator().manual_seed(seed)
    alive = torch.rand(rows, cols, generator=generator) < 0.5
    alive[0, 0] = True
    scores, growth = (torch.rand(rows, cols, generator=generator) for _ in range(2))
    after = exchange([alive], [scores * alive], [growth], share, context([alive], fraction=fraction))[0]
    assert int(after.sum()) == int(alive.sum())
    dropped, grown = alive & ~after, after & ~alive
    if dropped.any():
        assert scores[dropped].max() <= scores[alive & after].max()
        assert growth[grown].min() >= growth[~alive & ~after].max() if (~alive & ~after).any() else True


def test_rigl_proposes_the_exchange_and_wants_growth_scores():
    rule, mask = Rigl(0.5), torch.tensor([[True, True, False, False]])
    assert rule.needs_growth and not rule.every_step
    scores, growth = [torch.tensor([[1.0, 2.0, 0.0, 0.0]])], [torch.tensor([[0.0, 0.0, 1.0, 2.0]])]
    multipliers, _ = rule.propose(scores, growth, {}, context([mask], fraction=0.0))
    assert multipliers[0].tolist() == [[0.0, 1.0, 0.0, 1.0]]


def test_magnitude_with_regrowth_hits_the_same_sparsity():
    mask = torch.ones(1, 8, dtype=torch.bool)
    scores, growth = [torch.arange(8.0).view(1, 8)], [torch.arange(8.0, 0.0, -1.0).view(1, 8)]
    plain, _ = Magnitude().propose(scores, growth, {}, context([mask]))
    rule = Magnitude(regrow=0.5)
    assert rule.needs_growth and not Magnitude().needs_growth
    exchanged, _ = rule.propose(scores, growth, {}, context([mask], fraction=0.0))
    assert plain[0].tolist() == [[0.0] * 4 + [1.0] * 4]
    assert exchanged[0].tolist() == [[1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0]]
    last, _ = rule.propose(scores, growth, {}, context([mask], fraction=1.0))
    assert torch.equal(last[0], plain[0])


@pytest.mark.parametrize("place", [0, 1], ids=["head first", "head last"])
@pytest.mark.parametrize(
    "rule", [Magnitude(), Magnitude(regrow=0.9), Rigl(0.9), GroupLasso(), GroupLasso(form="proximal", strength=1e3)]
)
def test_no_rule_takes_the_last_block_of_a_row_of_a_head(rule, place):
    """Wherever it is defined: an output without a live block is a lost class."""
    body, head = torch.ones(4, 4, dtype=torch.bool), torch.ones(2, 4, dtype=torch.bool)
    if isinstance(rule, Rigl):
        body, head = body.tril(), torch.tensor([[True, False, False, False], [True, True, True, False]])
    scores = [torch.arange(16.0).view(4, 4) + 9, torch.tensor([[0.1, 0.2, 0.4, 0.3], [0.5, 0.6, 0.7, 0.8]])]
    growth = [torch.rand(4, 4), torch.tensor([[0.0] * 4, [9.0] * 4])]
    order, is_head = (slice(None, None, 1 if place else -1), (not place, bool(place)))
    ctx = context([body, head][order], areas=(1, 1), sparsity=0.6, heads=is_head, steps_to_update=1)
    multipliers, _ = rule.propose(scores[order], growth[order], {}, ctx)
    assert (multipliers[place] != 0).any(1).all()
    without, _ = rule.propose(scores[order], growth[order], {}, replace(ctx, heads=(False, False)))
    assert not (without[place] != 0).any(1).all()
    assert all(((m == 0) | (m == 1)).all() or isinstance(rule, GroupLasso) for m in multipliers)


def test_group_lasso_shrinks_by_what_the_next_update_wants():
    rule, mask, scores = GroupLasso(), torch.ones(1, 5, dtype=torch.bool), [torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])]
    multipliers, state = rule.propose(scores, None, {}, context([mask], is_update=False))
    # 0.75 of five blocks, so four, have to die in 5 steps: the fourth score over 5, whatever the rate
    assert torch.allclose(multipliers[0], (1 - 0.8 / scores[0]).clamp_min(0)) and state == {"due": [4]}
    last = rule.propose(scores, None, {}, context([mask], steps_to_update=1, learning_rates=(0.0,)))[0][0]
    assert last[0].tolist() == pytest.approx([0, 0, 0, 0, 0.2])
    rested = rule.propose(scores, None, {}, context([torch.tensor([[False] * 4 + [True]])]))[0][0]
    assert rested.tolist() == [[0, 0, 0, 0, 1]]


@pytest.mark.parametrize("rates", [(1.0, 1.0), (1.0, 0.01), (0.0, 0.0)])
def test_what_is_due_counts_weights_and_leaves_out_what_stays(rates):
    masks = [torch.tensor([[True, True]]), torch.tensor([[True, True, True, False]])]
    scores = [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0, 5.0, 9.0]])]
    # in order: the dead one of 1 weight, then 4 weights of score 1, then 1 and 1 of 3 and 4, of 12; 2 and 5 are the layers' best
    wanted = {1: ([0, 1], [0, 0]), 2: ([1, 1], [1, 0]), 5: ([1, 1], [1, 0]), 6: ([1, 2], [1, 3]), 7: ([1, 3], [1, 4])}
    settings = {"areas": (4, 1), "score": "gate", "learning_rates": rates, "steps_to_update": 2}
    for weights, (due, thresholds) in {**wanted, 11: wanted[7]}.items():
        ctx = context(masks, next_sparsity=weights / 12, **settings)
        assert blocks_due(scores, ctx) == due
        assert due_thresholds(scores, due, ctx) == [each / 2 for each in thresholds]
    alone = context(masks, next_sparsity=0.5, **{**settings, "learning_rates": (0.0, 1.0)})
    assert blocks_due(scores, alone) == [0, 2]  # half of the layer that moves


class FakeGate:
    def __init__(self, gate):
        self.gate = gate


def test_kron_l1_penalty_is_the_mean_magnitude_and_grows_to_three_times():
    gate = torch.tensor([[-3.0, 1.0], [0.5, -0.5]], requires_grad=True)
    other = torch.tensor([[2.0]], requires_grad=True)
    rule, masks = KronL1(strength=0.2), [torch.ones(2, 2, dtype=torch.bool), torch.ones(1, 1, dtype=torch.bool)]
    targets = [FakeGate(gate), FakeGate(other)]
    for step, growth in ((0, 1.0), (50, 2.0), (100, 3.0)):
        penalty = rule.penalty(targets, context(masks, step=step))
        assert penalty is not None
        assert penalty.item() == pytest.approx(0.2 * growth * 7 / 5, rel=1e-6)
    penalty.backward()
    assert gate.grad is not None
    # 0.2 * 3 / 5 per gate, with its sign
    assert torch.allclose(gate.grad, 0.12 * gate.detach().sign())


def test_kron_l1_penalty_of_many_half_precision_gates_is_finite():
    gate = torch.ones(256, 256, dtype=torch.float16, requires_grad=True)
    penalty = KronL1(strength=1.0).penalty([FakeGate(gate)], context([torch.ones(256, 256, dtype=torch.bool)], step=0))
    assert penalty is not None and penalty.item() == 1.0
    penalty.backward()
    assert gate.grad is not None and torch.equal(gate.grad, torch.full_like(gate, 2**-16))


def test_kron_l1_gradient_form_cuts_only_at_the_end():
    rule, mask = KronL1(), torch.ones(1, 4, dtype=torch.bool)
    scores = [torch.tensor([[0.1, 0.9, 0.2, 0.8]])]
    assert not rule.every_step
    assert rule.propose(scores, None, {}, context([mask]))[0][0].tolist() == [[1.0] * 4]
    assert rule.propose(scores, None, {}, context([mask], is_last_update=True))[0][0].tolist() == [[0.0, 1.0, 0.0, 1.0]]


def test_kron_l1_proximal_form_shrinks_every_step_and_has_no_penalty_in_the_loss():
    rule, mask = KronL1("proximal", 1.0), torch.ones(1, 2, dtype=torch.bool)
    assert rule.every_step and rule.penalty([], context([mask])) is None
    multipliers, _ = rule.propose([torch.tensor([[0.5, 1.0]])], None, {}, context([mask], is_update=False))
    assert torch.allclose(multipliers[0], torch.tensor([[0.8, 0.9]]))


def test_a_block_whose_score_is_the_threshold_dies():
    """Whatever 1 - threshold / score rounds to."""
    scores = [torch.rand(1, 500, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1]
    mask = torch.ones(1, 500, dtype=torch.bool)
    for score in scores[0].flatten().sort().values[:400].tolist():
        multipliers = shrink(scores, [score], context([mask]), 0.99)[0]
        assert (multipliers[scores[0] <= score] == 0).all() and (multipliers[scores[0] > score] > 0).all()
    assert shrink([torch.zeros(1, 2)], [0.0], context([mask[:, :2]]), 0.9)[0].tolist() == [[1.0, 1.0]]


def _concentrated(m1: int, n1: int) -> torch.Tensor:
    """Norms as products of a scale for each row and column, which differ by factors, and noise."""
    scales = torch.logspace(0, 1, m1, dtype=torch.float64).unsqueeze(1) * torch.logspace(0, 1.5, n1, dtype=torch.float64)
    return scales * torch.empty(m1, n1, dtype=torch.float64).uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(3))


def test_relative_scores_keep_blocks_in_every_row_and_column_where_norms_empty_them():
    score = _concentrated(12, 20)
    everything = torch.ones(12, 20, dtype=torch.bool)

    def empty(score, kind):
        (kept,) = cut([score], context([everything], score=kind), 0.75)
        assert int(kept.sum()) == 60
        return int((~kept.any(1)).sum() + (~kept.any(0)).sum())

    assert empty(score, "norm") > 5
    assert empty(balanced(score, everything), "relative") == 0


def test_balanced_scores_are_free_of_scales_of_rows_and_columns():
    live = torch.rand(6, 9, generator=torch.Generator().manual_seed(1)) > 0.3
    live[2], live[:, 4] = False, False
    plain = torch.rand(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) + 0.5
    scaled = plain * torch.logspace(0, 6, 6, dtype=torch.float64).unsqueeze(1) * torch.logspace(3, -3, 9, dtype=torch.float64)
    found, same = balanced(scaled, live), balanced(plain, live)
    assert (found[~live] == 0).all()
    # three rounds leave a few per cent of the scales, here of 12 orders of magnitude
    assert torch.allclose(found[live], same[live], rtol=0.05)
    columns = live.any(0)
    # the norm counts for a thousandth
    assert torch.allclose(found.sum(0)[columns], live.sum(0)[columns].double(), rtol=1e-3)
    product = torch.linspace(1, 2, 6).unsqueeze(1) * torch.linspace(1, 3, 9)  # equal after balance, but for rounding
    assert torch.equal(balanced(product, torch.ones(6, 9, dtype=torch.bool)).flatten().argmax(), product.flatten().argmax())
    assert (balanced(torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool)) == 0).all()


def test_regrowth_of_relative_scores_spreads_over_rows_and_columns():
    growth, alive = _concentrated(12, 20), torch.zeros(12, 20, dtype=torch.bool)
    alive.view(-1)[::4] = True
    norms = torch.ones(12, 20, dtype=torch.float64)

    def grown_rows(score):
        settings = context([alive], sparsity=0.75, target_sparsity=0.75, fraction=0.0, score=score)
        ((after,), _) = Magnitude(score, regrow=0.5).propose([norms * alive], [growth], {}, settings)
        return int((after & ~alive).any(1).sum())

    assert grown_rows("relative") > grown_rows("norm")
