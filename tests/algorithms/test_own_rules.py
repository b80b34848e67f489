"""Algorithms of a user's own, given to `sparsify_`."""

from __future__ import annotations

import pytest
import torch
from tests.helpers import STEPS, Training, factors, mlp, same

import kronblocks
from kronblocks import KronblocksError, KronblocksWarning, SparsityConfig, sparsify_
from kronblocks.algorithms.rules.base import cut


class Slowest(kronblocks.Rule):
    """Kills the blocks whose norm has grown least since the last update."""

    def propose(self, scores, growth_scores, state, ctx):
        before = state.get("before", [torch.ones_like(score) for score in scores])
        grown = [new / old.clamp_min(1e-12) for new, old in zip(scores, before, strict=True)]
        return cut(grown, ctx, ctx.sparsity), {"before": [score.clone() for score in scores]}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["two-phase", "kron-l1", "magnitude"])
def test_a_rule_of_ones_own_decides_and_resumes_to_the_same_bits(method):
    config = SparsityConfig(method=method, block_size=4, target_sparsity=0.75, **factors(method))
    whole = Training(config, rule=Slowest()).start().run(STEPS)
    assert whole.sparsifier.sparsity == 0.75
    resumed = Training(config, rule=Slowest(), seed=99).start(Training(config, rule=Slowest()).start().run(15).state()).run(STEPS)
    assert same(whole.state(), resumed.state())
    by_norm = Training(config).start().run(STEPS)
    masks = [[target.mask for target in training.sparsifier.targets] for training in (whole, by_norm)]
    assert any(not torch.equal(own, other) for own, other in zip(*masks, strict=True))
    with pytest.raises(KronblocksError, match=r"rule Slowest.*same"):
        Training(config).start(whole.state())


def test_a_rule_that_misses_the_target_is_told_of_once():
    class Keeps(kronblocks.Rule):
        def propose(self, scores, growth_scores, state, ctx):
            return cut(scores, ctx, min(ctx.sparsity, 0.5)), state

    training = Training(SparsityConfig(method="magnitude", block_size=4, target_sparsity=0.75), rule=Keeps()).start()
    with pytest.warns(KronblocksWarning, match=r"ended, and 50.0% of the weights are in zero blocks, not the 75%.*Keeps") as said:
        training.run(STEPS)
    assert len(said) == 1


def test_a_penalty_of_ones_own_is_trained_on():
    class Shrinking(Slowest):
        has_penalty = True

        def penalty(self, targets, ctx):
            return torch.tensor(7.0)

    training = Training(SparsityConfig(method="magnitude", block_size=4), rule=Shrinking()).start()
    assert float(training.sparsifier.penalty()) == 7.0


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        (Slowest, r"rule=Slowest is a class: write rule=Slowest\(\.\.\.\)"),
        (object(), r"rule=object has no propose, penalty, .*subclass of kronblocks.Rule"),
        (type("Odd", (Slowest,), {"score": "size"})(), r"Odd\.score"),
    ],
)
def test_what_is_no_rule_is_refused_before_anything_is_changed(rule, says):
    model = mlp(32, 24, 16)
    with pytest.raises(KronblocksError, match=says):
        sparsify_(model, SparsityConfig(method="magnitude", block_size=4), rule=rule)
    assert type(model[0]) is torch.nn.Linear
    with pytest.raises(KronblocksError, match="no blocks for a rule"):
        sparsify_(model, SparsityConfig(method="dense"), rule=Slowest())


@pytest.mark.parametrize("settings", [{"score": "taylor"}, {"regrow": 0.1}])
def test_settings_that_a_rule_of_ones_own_decides_are_refused(settings):
    (name,) = settings
    with pytest.raises(KronblocksError, match=f"^{name}: your rule= decides that"):
        sparsify_(mlp(32, 24, 16), SparsityConfig(method="magnitude", block_size=4, **settings), rule=Slowest())
    with pytest.raises(KronblocksError, match="^penalty: your rule= decides"):
        config = SparsityConfig(method="kron-l1", block_size=4, penalty=kronblocks.PenaltyConfig(strength=2.0))
        sparsify_(mlp(32, 24, 16), config, rule=Slowest())


def test_multipliers_and_scores_that_cannot_be_are_refused():
    class Short(Slowest):
        def propose(self, scores, growth_scores, state, ctx):
            return [torch.ones(1, 1) for _ in scores], state

    with pytest.raises(KronblocksError, match=r"Short\.propose returned .*\(1, 1\).*for each block"):
        Training(SparsityConfig(method="magnitude", block_size=4), rule=Short()).start().run(STEPS)

    class Negative(Slowest):
        def propose(self, scores, growth_scores, state, ctx):
            return cut([-score for score in scores], ctx, ctx.sparsity), state

    with pytest.raises(KronblocksError, match="scores from 0 on"):
        Training(SparsityConfig(method="magnitude", block_size=4), rule=Negative()).start().run(STEPS)


ANSWERS = {
    "nothing": (lambda masks: None, "NoneType: return"),
    "masks alone": (lambda masks: list(masks), "list: return"),
    "no tensors": (lambda masks: ([mask.tolist() for mask in masks], {}), "no list of tensors"),
    "a list for a state": (lambda masks: (masks, []), "tuple: return"),
    "NaN": (lambda masks: ([mask * float("nan") for mask in masks], {}), "not finite"),
    "numbers below 0": (lambda masks: ([-1.0 * mask for mask in masks], {}), "below 0"),
}


@pytest.mark.parametrize("what", ANSWERS)
def test_what_no_rule_may_answer_is_refused_before_a_weight_changes(what):
    answer, words = ANSWERS[what]

    class Odd(Slowest):
        def propose(self, scores, growth_scores, state, ctx):
            return answer(ctx.masks)

    training = Training(SparsityConfig(method="magnitude", block_size=4, target_sparsity=0.5), rule=Odd()).start()
    with pytest.raises(KronblocksError, match=rf"Odd\.propose returned .*{words}"):
        training.run(STEPS)
    assert all(bool(torch.isfinite(p).all()) for p in training.model.parameters())
