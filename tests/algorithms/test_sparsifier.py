"""The sparsifier on real optimisers: exact targets, phases, resuming to the same bits."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from tests.helpers import METHODS, STEPS, Training, factors, mlp, same
from torch import Tensor, nn

import kronblocks
from kronblocks import PenaltyConfig, ScheduleConfig, SparsityConfig, parameter_groups, sparsify_
from kronblocks.algorithms.training.sparsifier import Sparsifier
from kronblocks.config.methods import spec_of
from kronblocks.surgery.sparsify import ModelSurgeon


# the lift comes after step 11, healing after 16 (of kron-l1 32, of the others 20)
@pytest.mark.parametrize("stop", [5, 11, 12, 16, 20, 30])
@pytest.mark.parametrize("method", METHODS)
def test_interrupted_and_resumed_equals_uninterrupted(method, stop):
    config = SparsityConfig(method=method, block_size=4, target_sparsity=0.75, **factors(method))
    whole = Training(config).start().run(STEPS)
    first = Training(config).start().run(stop)
    resumed = Training(config, seed=99).start(first.state()).run(STEPS)
    assert same(whole.state(), resumed.state())
    assert whole.sparsifier.report().live_blocks == whole.sparsifier.report().total_blocks // 4


@pytest.mark.parametrize("form", ["gradient", "proximal"])
def test_both_forms_of_kron_l1_end_with_exact_zeros(form):
    config = SparsityConfig(method="kron-l1", block_size=4, rank=2, target_sparsity=0.75, penalty=PenaltyConfig(form=form))
    training = Training(config).start()
    assert training.model[0].gate is not None
    assert training.run(STEPS).sparsifier.sparsity == 0.75


def test_two_phase_lifts_compacts_and_never_trains_a_dense_matrix():
    training = Training(SparsityConfig(block_size=4, rank=2, target_sparsity=0.75)).start()
    dense = sum(p.numel() for p in mlp(32, 24, 16, 8).parameters())
    counts, kinds = [], []
    for step in range(1, STEPS + 1):
        training.run(step)
        counts.append(sum(p.numel() for p in training.model.parameters()))
        kinds.append(type(training.model[0]).__name__)
        held = {id(p) for group in training.optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in training.model.parameters()}
        assert held >= {id(p) for p in training.optimizer.state}
    lift = training.sparsifier.schedule.lift_step
    assert lift == 11
    assert kinds == ["KroneckerBlockLinear"] * (lift - 1) + ["BlockSparseLinear"] * (STEPS - lift + 1)
    assert max(counts) < dense
    live = training.sparsifier.report().live_blocks
    assert counts[-1] == live * 16 + 24 + 16 + 8
    assert [len(group["params"]) for group in training.optimizer.param_groups] == [0, 3, 0, 0, 3]


def random_model(seed: int) -> tuple[nn.Sequential, SparsityConfig]:
    rng = random.Random(seed)
    block = rng.choice([2, 4, (2, 4), (4, 2), 3])
    unit = 12
    sizes = [unit * rng.randint(1, 5) for _ in range(rng.randint(3, 5))]
    method = rng.choice(METHODS)
    scope = rng.choice(["global", "layer"]) if not spec_of(method).starts_sparse else "global"
    rank = rng.randint(1, 3)
    sparsity = rng.choice([0.0, 0.3, 0.5, 2 / 3, 0.77])
    return mlp(*sizes), SparsityConfig(
        method=method, block_size=block, target_sparsity=sparsity, scope=scope, **factors(method, rank)
    )


@pytest.mark.parametrize("seed", range(10))
def test_the_target_is_hit_exactly_on_random_models(seed):
    torch.manual_seed(seed)
    model, config = random_model(seed)
    sparsifier = sparsify_(model, config)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2))
    sparsifier.attach(optimizer, total_steps=30)
    inputs = model[0].in_features
    for _ in range(30):
        loss = model(torch.randn(8, inputs)).square().mean() + sparsifier.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    report = sparsifier.report()
    layers = report.layers if config.scope == "layer" else (report,)
    for layer in layers:
        total = layer.total_blocks
        wanted = -(-round(config.target_sparsity * total * 1e9) // 10**9)  # ceil, without the product's last bits
        assert total - layer.live_blocks == wanted, report
    assert all(layer.live_blocks >= 1 for layer in report.layers)


def test_unequal_block_sizes_reach_the_share_of_weights():
    torch.manual_seed(0)
    model = mlp(32, 24, 10)
    sparsifier = sparsify_(model, SparsityConfig(block_size=8, rank=2, target_sparsity=0.8, on_mismatch="nearest"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier.attach(optimizer, total_steps=20)
    for _ in range(20):
        optimizer.zero_grad()
        model(torch.randn(8, 32)).square().mean().backward()
        optimizer.step()
    report = sparsifier.report()
    assert [layer.block_size for layer in report.layers] == ["8x8", "2x8"]
    # one more dead block of the larger size (64 of 1008 weights) would not have been needed
    assert 0.8 <= report.block_sparsity < 0.8 + 64 / 1008


@pytest.mark.parametrize(
    "make",
    [
        torch.optim.AdamW,
        lambda p: torch.optim.SGD(p, momentum=0.9, nesterov=True),
        torch.optim.RMSprop,
        lambda p: torch.optim.AdamW(p, fused=True),
        lambda p: torch.optim.Adagrad(p),
    ],
)
def test_ordinary_optimisers_work_through_all_phases(make):
    training = Training(SparsityConfig(block_size=4, rank=2, target_sparsity=0.75), optimizer=make).start().run(STEPS)
    assert training.sparsifier.sparsity == 0.75
    for name in ("0", "2", "4"):
        for parameter in training.model.get_submodule(name).parameters():
            for value in training.optimizer.state[parameter].values():
                assert value.dim() == 0 or value.shape == parameter.shape


def test_zeros_hold_after_every_step_of_every_optimiser_in_a_list():
    torch.manual_seed(0)
    model = mlp(32, 24, 16)
    sparsifier = sparsify_(model, SparsityConfig(method="magnitude", block_size=4, target_sparsity=0.75))
    first = torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9)
    second = torch.optim.AdamW(model[2].parameters(), lr=0.01)
    sparsifier.attach([first, second], total_steps=20)
    for step in range(1, 21):
        model(torch.randn(8, 32)).square().mean().backward()
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()
        assert sparsifier.step == step
        for target in sparsifier.targets:
            weight = target.module.weight
            assert isinstance(weight, Tensor)
            assert ((target.grid.to_blocks(weight) != 0).flatten(2).any(2) == target.mask).all()
    assert sparsifier.sparsity == 0.75


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_amp_skipped_do_not_count(fused):
    config = SparsityConfig(method="magnitude", block_size=4, target_sparsity=0.5)
    training = Training(config, optimizer=lambda groups: torch.optim.AdamW(groups, fused=fused)).start().run(3)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def step(factor: float) -> None:
        training.optimizer.zero_grad()
        scaler.scale(training.model(torch.ones(4, 32)).sum() * factor).backward()
        scaler.step(training.optimizer)
        scaler.update()

    step(float("inf"))
    assert training.sparsifier.step == 3
    step(1.0)
    assert training.sparsifier.step == 4


def test_gradient_clipping_sees_no_gradient_of_dead_blocks():
    training = Training(SparsityConfig(method="magnitude", block_size=4, target_sparsity=0.75)).start().run(30)
    target = training.sparsifier.targets[0]
    training.optimizer.zero_grad()
    training.model(torch.randn(4, 32)).sum().backward()
    gradient = target.module.weight.grad
    assert isinstance(gradient, Tensor)
    assert (target.grid.to_blocks(gradient)[~target.mask] == 0).all()


class Recording:
    """A rule that asks for growth scores and kills nothing."""

    score, every_step, needs_growth, has_penalty = "norm", False, True, False

    def __init__(self) -> None:
        self.seen: list[tuple[int, list[Tensor]]] = []

    def propose(self, scores, growth_scores, state, ctx):
        self.seen.append((ctx.step, growth_scores))
        return [mask.float() for mask in ctx.masks], state

    def penalty(self, targets, ctx):
        return None


@pytest.mark.filterwarnings("ignore:pruning has ended")
def test_growth_scores_reach_a_rule_that_asks_for_them_at_updates():
    training = Training(SparsityConfig(method="magnitude", block_size=4, target_sparsity=0.5))
    rule = Recording()
    training.sparsifier.rule = rule
    training.start().run(STEPS)
    schedule = training.sparsifier.schedule
    assert schedule is not None
    assert [step for step, _ in rule.seen] == [step for step in range(STEPS + 1) if schedule.is_update(step)]
    for _, growth in rule.seen:
        assert [tuple(g.shape) for g in growth] == [(6, 8), (4, 6), (2, 4)]
        assert all((g > 0).all() for g in growth)


def test_dense_is_a_method_that_does_nothing():
    torch.manual_seed(0)
    model = mlp(32, 24, 16)
    before = [p.clone() for p in model.parameters()]
    sparsifier = sparsify_(model, SparsityConfig(method="dense"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparsifier.attach(optimizer, total_steps=5)
    for _ in range(5):
        (model(torch.randn(4, 32)).sum() + sparsifier.penalty()).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert sparsifier.sparsity == 0 and sparsifier.report().layers == ()


@pytest.mark.parametrize(("method", "wanted"), [("two-phase", False), ("group-lasso", False), ("rigl", False), ("kron-l1", True)])
def test_rules_without_a_penalty_cost_nothing_in_the_loss(method, wanted, monkeypatch):
    training = Training(SparsityConfig(method=method, block_size=4)).start()
    made, context = [], training.sparsifier._context
    monkeypatch.setattr(training.sparsifier, "_context", lambda step: made.append(step) or context(step))
    assert (training.sparsifier.penalty() > 0) == wanted and len(made) == wanted


def test_removing_the_attachment_stops_everything():
    training = Training(SparsityConfig(method="magnitude", block_size=4, target_sparsity=0.5))
    optimizer = torch.optim.SGD(training.model.parameters(), lr=0.1)
    handle = training.sparsifier.attach(optimizer, total_steps=10)
    handle.remove()
    training.model(torch.randn(4, 32)).sum().backward()
    optimizer.step()
    assert training.sparsifier.step == 0
    training.sparsifier.attach(optimizer, total_steps=10)


@pytest.mark.filterwarnings("ignore:pruning has ended")
def test_a_sparsifier_can_be_made_by_hand_with_an_own_rule():
    """The parts are public enough to write an algorithm without touching the library."""
    torch.manual_seed(0)
    model = mlp(16, 8)
    report = kronblocks.surgery.select(model, SparsityConfig(method="magnitude", block_size=4))
    from kronblocks.algorithms.masked import MaskedLinear
    from kronblocks.algorithms.targets import BlockTarget

    target = BlockTarget("0", MaskedLinear(model[0], report.selected[0].grid))
    rule = Recording()
    sparsifier = Sparsifier(
        model,
        [target],
        rule,
        lambda steps: kronblocks.algorithms.SparsitySchedule(0.5, steps),
        ModelSurgeon(model, report),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer, total_steps=10)
    for _ in range(10):
        model(torch.randn(2, 16)).sum().backward()
        optimizer.step()
    assert rule.seen


def test_schedule_settings_reach_the_schedule():
    config = SparsityConfig(block_size=4, rank=2, schedule=ScheduleConfig(start=0.1, end=0.9, lift_at=0.5, shape="linear"))
    schedule = Training(config).start().sparsifier.schedule
    assert schedule is not None
    assert (schedule.start_step, schedule.lift_step, schedule.end_step, schedule.shape) == (4, 20, 36, "linear")


@pytest.mark.slow
@pytest.mark.parametrize("earlier", [5, 11, 14, 20])  # before the lift, after it, after more blocks have died, when healing
@pytest.mark.parametrize("method", ["two-phase", "kron-l1", "rigl", "magnitude"])
def test_going_back_in_place_gives_the_same_bits(method, earlier):
    """The last good state after a divergence: model, sparsifier and optimiser stay the objects that they are."""
    config = SparsityConfig(method=method, block_size=4, target_sparsity=0.75, **factors(method))
    whole = Training(config).start().run(STEPS)
    training = Training(config).start().run(earlier)
    good = training.state()
    training.run(30)
    for part in ("sparsifier", "model", "optimizer", "scheduler"):
        getattr(training, part).load_state_dict(good[part])
    assert same(training.run(STEPS).state(), whole.state())


def test_a_penalty_is_added_to_the_gradients_of_a_closure_too():
    strong = PenaltyConfig(strength=30.0)
    gates = []
    for with_closure in (False, True):
        training = Training(SparsityConfig(method="kron-l1", block_size=4, rank=2, penalty=strong))
        optimizer = torch.optim.SGD(training.model.parameters(), lr=0.05)
        training.sparsifier.attach(optimizer, total_steps=STEPS, add_penalty=True)

        def closure(training=training, optimizer=optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = training.model(torch.ones(2, 32)).square().mean()
            loss.backward()
            return loss

        for _ in range(10):
            if with_closure:
                assert isinstance(optimizer.step(closure), Tensor)
            else:
                closure()
                optimizer.step()
        gates.append(training.model[0].gate.detach().clone())
    assert torch.equal(*gates) and gates[0].mean() < 0.9


@pytest.mark.parametrize("method", METHODS)
def test_optimisers_that_set_their_steps_by_themselves(method):
    class Signs(torch.optim.Optimizer):
        def __init__(self, params, lr=None) -> None:
            super().__init__(params, {"lr": lr})

        @torch.no_grad()
        def step(self, closure=None) -> Any:
            for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
                p -= 1e-3 * p.grad.sign()

    training = Training(SparsityConfig(method=method, block_size=4, target_sparsity=0.75, **factors(method)))
    optimizer = Signs(training.model.parameters())
    training.sparsifier.attach(optimizer, total_steps=STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (training.model(torch.randn(4, 32)).square().mean() + training.sparsifier.penalty()).backward()
        optimizer.step()
    assert training.sparsifier.sparsity == 0.75
