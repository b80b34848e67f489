"""Loops that people write themselves."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from typing import get_args

import torch
from tests.in_the_field.cases import limited, refused, works
from tests.in_the_field.trial import SPARSITY, STEPS, Trial, batch, check_layers_agree, config, loss_of, mlp, same_output
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from kronblocks import densify_, lift_, parameter_groups, sparsify_
from kronblocks.methods import Method

LOOPS = "loops"


@works(LOOPS, "plain loop, every method", "three lines of change")
def plain() -> None:
    for method in get_args(Method):
        if method != "dense":
            trial = Trial(settings=config(method))
            trial.train(trial.adam())


@works(LOOPS, "gradient accumulation", "only `optimizer.step()` counts")
def accumulation() -> None:
    trial = Trial()
    optimizer = trial.adam()
    for number in range(3 * STEPS):
        (loss := loss_of(trial.model) / 3).backward()
        if number % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
            trial.note(3 * loss)
    assert trial.sparsifier.step == STEPS
    trial.check()


@works(
    LOOPS,
    "clip_grad_norm_, clip_grad_value_",
    "gradients of dead blocks are zero when they are clipped; ask `model.parameters()` in each step",
)
def clipping() -> None:
    trial = Trial()
    optimizer = trial.adam()
    while trial.sparsifier.step < STEPS:
        optimizer.zero_grad()
        loss = loss_of(trial.model)
        loss.backward()
        nn.utils.clip_grad_norm_(trial.model.parameters(), 0.1)
        nn.utils.clip_grad_value_(trial.model.parameters(), 0.01)
        gradients = [p.grad for p in trial.model.parameters() if p.grad is not None]
        assert len(gradients) == len(list(trial.model.parameters()))
        assert 0 < max(g.abs().max() for g in gradients) <= 0.0100001
        optimizer.step()
        trial.note(loss)
    trial.check()


@works(LOOPS, "autocast in bf16", "as it is")
def autocast() -> None:
    trial = Trial()
    optimizer = trial.adam()
    while trial.sparsifier.step < STEPS:
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(trial.model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        trial.note(loss)
    assert {p.dtype for p in trial.model.parameters()} == {torch.float32}
    trial.check()


@works(LOOPS, "autocast in fp16 with GradScaler", "steps that the scaler skips do not count")
def scaler() -> None:
    trial = Trial()
    optimizer = trial.adam()
    scale = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1000)  # the first steps overflow
    made = 0
    while trial.sparsifier.step < STEPS:
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(trial.model)
        optimizer.zero_grad()
        scale.scale(loss).backward()
        scale.unscale_(optimizer)
        nn.utils.clip_grad_norm_(trial.model.parameters(), 1.0)
        scale.step(optimizer)
        scale.update()
        made += 1
        trial.note(loss)
        assert made < 3 * STEPS
    assert made > STEPS
    trial.check()


@works(LOOPS, "several optimisers for one model", "`attach([one, two], ...)`: a step counts when each has made one")
def several() -> None:
    trial = Trial()
    biases = [p for name, p in trial.model.named_parameters() if name.endswith("bias")]
    others = [p for name, p in trial.model.named_parameters() if not name.endswith("bias")]
    optimizers = [torch.optim.AdamW(others, lr=1e-2), torch.optim.SGD(biases, lr=1e-2)]
    trial.attach(optimizers)
    trial.train(*optimizers)


@works(LOOPS, "GAN: two models that train in turns", "a sparsifier and an optimiser each")
def gan() -> None:
    generator = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 32))
    critic = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    trials = [Trial(generator), Trial(critic)]
    optimizers = [trial.adam() for trial in trials]
    for _ in range(STEPS):
        real, made = torch.randn(16, 32), generator(torch.randn(16, 16))
        loss = critic(real).square().mean() + (1 - critic(made.detach())).square().mean()
        optimizers[1].zero_grad()
        loss.backward()
        optimizers[1].step()
        trials[1].note(loss)
        loss = critic(made).square().mean()
        optimizers[0].zero_grad()
        loss.backward()
        optimizers[0].step()
        trials[0].note(loss)
    for trial in trials:
        trial.check(falls=False)


@works(LOOPS, "MAML: an inner step by `functional_call`", "second derivatives go through the products")
def maml() -> None:
    trial = Trial()
    optimizer = trial.adam()
    while trial.sparsifier.step < STEPS:
        weights = dict(trial.model.named_parameters())
        x, y = batch()
        inner = (functional_call(trial.model, weights, (x,)) - y).square().mean()
        gradients = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
        adapted = {name: p - 0.1 * g for (name, p), g in zip(weights.items(), gradients, strict=True)}
        x, y = batch()
        loss = (functional_call(trial.model, adapted, (x,)) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        trial.note(loss)
    trial.check()


class Sam:
    """Sharpness-aware minimisation around another optimiser, as its usual implementation."""

    def __init__(self, parameters: list[nn.Parameter], base: torch.optim.Optimizer) -> None:
        self.base_optimizer, self._moved = base, []

    @torch.no_grad()
    def first_step(self) -> None:
        held = [p for group in self.base_optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in held]).norm() + 1e-12
        self._moved = [(p, 0.05 * p.grad / norm) for p in held]
        for p, way in self._moved:
            p.add_(way)

    @torch.no_grad()
    def second_step(self) -> None:
        for p, way in self._moved:
            p.sub_(way)
        self.base_optimizer.step()


@works(LOOPS, "SAM, two gradients a step", "`attach(optimizer.base_optimizer, ...)`")
def sam() -> None:
    trial = Trial()
    base = trial.adam()
    optimizer = Sam(list(trial.model.parameters()), base)
    while trial.sparsifier.step < STEPS:
        for move in (optimizer.first_step, optimizer.second_step):
            base.zero_grad()
            loss = loss_of(trial.model)
            loss.backward()
            move()
        trial.note(loss)
    trial.check()


@works(LOOPS, "steps with a closure", "one call of the closure a step, as torch's optimisers but LBFGS do")
def closure() -> None:
    trial = Trial()
    optimizer = trial.adam()
    while trial.sparsifier.step < STEPS:

        def evaluate() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(trial.model)
            loss.backward()
            return loss

        trial.note(optimizer.step(evaluate))
    trial.check()


@works(LOOPS, "gradient checkpointing", "with `use_reentrant` True or False")
def checkpointing() -> None:
    for reentrant in (False, True):
        trial = Trial()

        def forward(x: Tensor, reentrant: bool = reentrant, trial: Trial = trial) -> Tensor:
            return checkpoint(trial.model, x.requires_grad_(), use_reentrant=reentrant)

        trial.train(trial.adam(), model=forward)


@works(LOOPS, "several forward passes for one backward", "siamese networks, consistency losses, recurrence over one layer")
def siamese() -> None:
    trial = Trial()
    optimizer = trial.adam()
    while trial.sparsifier.step < STEPS:
        one, two = (trial.model(batch()[0]) for _ in range(2))
        loss = loss_of(trial.model) + 0.01 * (one - two).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        trial.note(loss)
    trial.check()


@works(LOOPS, "exceptions and Ctrl-C in mid-step", "a step counts when the optimiser has made it; go on, or load the last state")
def interrupted() -> None:
    trial = Trial()
    optimizer = trial.adam()
    while trial.sparsifier.step < STEPS:
        if trial.sparsifier.step % 5 == 4 and len(trial.losses) % 2:
            try:
                loss_of(trial.model).backward()
                raise KeyboardInterrupt
            except KeyboardInterrupt:
                trial.losses.append(trial.losses[-1])
        trial.step(optimizer)
    trial.check()


@limited(LOOPS, "early stopping", "ends at the sparsity that is reached: count only epochs in phase `heal`")
def early_stopping() -> None:
    trial = Trial()
    optimizer = trial.adam()
    for _ in range(8):
        trial.step(optimizer)
    assert trial.sparsifier.phase == "discover" and 0 < trial.sparsifier.sparsity < SPARSITY
    best, bad = float("inf"), 0
    while trial.sparsifier.step < STEPS and bad < 3:
        trial.step(optimizer)
        if trial.sparsifier.phase == "heal":
            best, bad = min(best, trial.losses[-1]), 0 if trial.losses[-1] < best else bad + 1
    trial.check(falls=False)


@works(LOOPS, "cross-validation, sweeps", "a new model, sparsifier and optimiser each")
def folds() -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        trial = Trial()
        trial.train(trial.adam())


class Estimator:
    """As skorch and scikit-learn do it: made by `fit`, cloned, pickled."""

    def fit(self) -> Estimator:
        self.trial = Trial()
        self.trial.train(self.trial.adam())
        self.module_ = self.trial.model
        return self


@works(
    LOOPS, "skorch and scikit-learn: fit, clone, pickle", "`sparsify_` where the module is made, `attach` where the optimiser is"
)
def estimators() -> None:
    found = Estimator().fit()
    cloned, pickled = copy.deepcopy(found.module_), pickle.loads(pickle.dumps(found.module_))  # noqa: S301
    assert same_output(found.module_, cloned) and same_output(found.module_, pickled)
    Estimator().fit()


@works(LOOPS, "save, and go on later", "sparsifier's state first, then the model's, then the optimiser's: the same bits")
def resumed() -> None:
    torch.manual_seed(5)
    whole = Trial()
    optimizer, file = whole.adam(), io.BytesIO()
    for step in range(STEPS):
        if step == 14:  # after the lift
            state = {"sparsifier": whole.sparsifier.state_dict(), "model": whole.model.state_dict()}
            torch.save({**state, "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}, file)
        whole.step(optimizer)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = Trial()
    again.sparsifier.load_state_dict(saved["sparsifier"])
    again.model.load_state_dict(saved["model"])
    optimizer = torch.optim.AdamW(parameter_groups(again.model, lr=1e-2))
    optimizer.load_state_dict(saved["optimizer"])
    again.attach(optimizer)
    torch.set_rng_state(saved["random"])
    again.train(optimizer)
    for (name, one), other in zip(whole.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


@works(LOOPS, "a layer's learning rate set to 0, warm restarts", "rates change zeros only through the optimiser")
def rates() -> None:
    trial = Trial()
    optimizer = trial.adam()
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 5)
    while trial.sparsifier.step < STEPS:
        trial.step(optimizer)
        schedule.step()
        if trial.sparsifier.step == 20:
            for group in optimizer.param_groups:
                group["lr"] = 0.0
    trial.check()


@works(LOOPS, "an own schedule of lifting", "`lift_(model, optimizer)` at any step")
def lifted_by_hand() -> None:
    trial = Trial()
    optimizer = trial.adam()
    for _ in range(5):
        trial.step(optimizer)
    lift_(trial.model, optimizer)
    trial.train(optimizer)


@refused(LOOPS, "a model that is trained twice with one sparsifier", "call `remove()` on the first handle", "attached already")
def attached_twice() -> None:
    trial = Trial()
    trial.adam()
    trial.adam()


@works(LOOPS, "back to dense for further work", "`densify_`: the same outputs, zeros included")
def dense_again() -> None:
    trial = Trial()
    trial.train(trial.adam())
    before = copy.deepcopy(trial.model)
    densify_(trial.model)
    assert same_output(before, trial.model) and type(trial.model[0]) is nn.Linear
    assert int((trial.model[0].weight == 0).sum()) >= 0.5 * trial.model[0].weight.numel()


@works(LOOPS, "`sparsify_` under torch.no_grad()", "parameters train all the same")
def without_gradients() -> None:
    with torch.no_grad():
        trial = Trial()
    trial.train(trial.adam())


@refused(LOOPS, "`sparsify_` under torch.inference_mode()", "call it outside", "under torch.inference_mode")
def in_inference_mode() -> None:
    with torch.inference_mode():
        Trial()


@works(LOOPS, "two models in two threads", "the same bits as one after the other")
def threads() -> None:
    found: dict[tuple[int, int], Tensor] = {}

    def run(seed: int, turn: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        model = mlp()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
        trial = Trial(model, config("magnitude", storage="packed"))
        optimizer = trial.adam()
        for _ in range(STEPS):
            loss = model(torch.randn(16, 32, generator=generator)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert trial.sparsifier.sparsity == SPARSITY
        found[seed, turn] = model(torch.ones(1, 32)).detach()

    for seed in (1, 2):
        run(seed, 0)
    started = [threading.Thread(target=run, args=(seed, 1)) for seed in (1, 2)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    assert all(torch.equal(found[seed, 0], found[seed, 1]) for seed in (1, 2))


@works(LOOPS, "WGAN-GP and other penalties on gradients", "backward of backward, over the lift")
def gradient_penalty() -> None:
    trial = Trial()
    optimizer = trial.adam()
    while trial.sparsifier.step < STEPS:
        x = torch.randn(16, 32, requires_grad=True)
        (slope,) = torch.autograd.grad(trial.model(x).sum(), x, create_graph=True)
        loss = loss_of(trial.model) + 0.01 * slope.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        trial.note(loss)
    trial.check()


@works(LOOPS, "detect_anomaly, use_deterministic_algorithms", "as they are")
def modes() -> None:
    for method in ("two-phase", "rigl"):
        try:
            torch.use_deterministic_algorithms(True)
            trial = Trial(settings=config(method))
            with torch.autograd.set_detect_anomaly(True):
                trial.train(trial.adam())
        finally:
            torch.use_deterministic_algorithms(False)


@refused(LOOPS, "LBFGS", "its line search expects a fixed set of weights: use an optimiser of one gradient a step", "LBFGS")
def lbfgs() -> None:
    trial = Trial()
    trial.attach(torch.optim.LBFGS(trial.model.parameters()))


@refused(LOOPS, "the optimiser made before `sparsify_`", "make it afterwards", "make the optimiser after sparsify_")
def too_early() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsify_(model, config()).attach(optimizer, total_steps=STEPS)


@works(LOOPS, "no_grad and inference_mode around validation", "each few steps, over the lift")
def validation() -> None:
    trial = Trial()
    optimizer = trial.adam()
    while trial.sparsifier.step < STEPS:
        trial.step(optimizer)
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                loss_of(trial.model.eval(), rows=7)
        trial.model.train()
        check_layers_agree(trial.model)
    trial.check()
