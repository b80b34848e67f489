"""Other numbers of steps than usual: a trial of one, and more than a state's training had."""

from __future__ import annotations

import pytest
import torch
from tests import helpers
from tests.helpers import METHODS, STEPS, Training, factors, same

from kronblocks import KronblocksError, SparsityConfig
from kronblocks.config.methods import spec_of
from kronblocks.core.errors import KronblocksWarning, OtherSteps


def config(method: str = "two-phase") -> SparsityConfig:
    return helpers.config(method, block_size=4, **factors(method))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:1 step is too few to prune:kronblocks.KronblocksWarning")
@pytest.mark.filterwarnings("ignore:pruning has ended, and .* kept less than a third:kronblocks.KronblocksWarning")
def test_a_trial_of_one_step_runs_with_every_method(method):
    training = Training(config(method))
    before = [p.detach().clone() for p in training.model.parameters()]
    training.start(steps=1).run(1)
    assert training.sparsifier.step == 1 and any(
        not torch.equal(a, b) for a, b in zip(before, training.model.parameters(), strict=True)
    )
    if not training.sparsifier.schedule.prunes and not spec_of(method).starts_sparse:
        assert training.sparsifier.sparsity == 0 and training.sparsifier.phase == "discover"


def test_a_trial_says_that_it_prunes_nothing_and_says_it_once():
    training = Training(config())
    with pytest.warns(
        KronblocksWarning, match=r"^1 step is too few to prune from 0.05 to 0.4 .*: nothing is pruned in this run$"
    ):
        training.start(steps=1)
    training.run(1).sparsifier.warn_if_too_dense("it ended early")  # a warning would be an error here


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stop", [33, STEPS])
def test_a_training_goes_on_for_longer_once_the_mask_is_frozen(method, stop):
    """To the same bits as one that was never stopped: nothing of the schedule is left to move."""
    whole = Training(config(method)).start().run(STEPS + 10)
    first = Training(config(method)).start().run(stop)
    state, masks = first.state(), [target.mask.clone() for target in first.sparsifier.targets]
    resumed = Training(config(method), seed=9).start(state, steps=STEPS + 10).run(STEPS + 10)
    assert resumed.sparsifier.phase == "heal" and same(whole.state(), resumed.state())
    assert all(torch.equal(mask, target.mask) for mask, target in zip(masks, resumed.sparsifier.targets, strict=True))


def test_before_that_other_steps_are_refused_and_nothing_has_changed():
    state = Training(config()).start().run(14).state()
    fresh = Training(config())
    with pytest.raises(OtherSteps, match=r"step 14 of 40, and pruning ends at step 16, .* 50 steps .*: write total_steps=40"):
        fresh.start(state, steps=50)
    attached = Training(config()).start(steps=50)
    before = attached.state()
    with pytest.raises(KronblocksError, match="would move its schedule"):
        attached.sparsifier.load_state_dict(state["sparsifier"])
    assert same(before, attached.state())
    attached.sparsifier.load_state_dict(Training(config()).start().run(20).state()["sparsifier"])
    assert attached.sparsifier.step == 20 and attached.sparsifier.phase == "heal"


def test_a_sparsifier_that_was_let_go_remembers_its_steps():
    training = Training(config()).start().run(14)
    training.handle.remove()
    assert training.sparsifier.state_dict()["total_steps"] == STEPS and training.sparsifier.phase == "refine"
    with pytest.raises(OtherSteps):
        training.sparsifier.attach(training.optimizer, total_steps=STEPS + 1)
    training.sparsifier.attach(training.optimizer, total_steps=STEPS)
    again = Training(config()).start(steps=9)  # nothing has been done yet
    again.handle.remove()
    again.sparsifier.attach(again.optimizer, total_steps=STEPS)
