"""Loops that people write themselves."""

from __future__ import annotations

import torch
from tests.helpers import STEPS
from tests.in_the_field.cases import works
from tests.in_the_field.trial import Trial, batch, config, loss_of, mlp
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from kronblocks.config.methods import METHODS

LOOPS = "loops"


@works(LOOPS, "plain loop, every method", "three lines of change")
def plain() -> None:
    for method in METHODS:
        if method != "dense":
            trial = Trial(settings=config(method))
            trial.train(trial.adam())


@works(
    LOOPS,
    "frozen layers (transfer learning)",
    "stay as they are, and do not count in the sparsity; `frozen='sparsify'` asks for them",
)
def frozen() -> None:
    trial = Trial(nn.Sequential(nn.Linear(32, 32).requires_grad_(False), nn.ReLU(), *mlp()))
    x = batch()[0]
    before = trial.model[0](x)
    trial.train(trial.adam())
    assert [target.name for target in trial.sparsifier.targets] == ["2", "4"] and torch.equal(trial.model[0](x), before)


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
    "gradients of dead blocks are zero when they are clipped; a list of parameters may be kept",
)
def clipping() -> None:
    trial = Trial()
    optimizer = trial.adam()
    kept = list(trial.model.parameters())  # from before the lift
    while trial.sparsifier.step < STEPS:
        optimizer.zero_grad()
        loss = loss_of(trial.model)
        loss.backward()
        nn.utils.clip_grad_norm_(trial.model.parameters(), 0.1)
        nn.utils.clip_grad_value_(kept, 0.01)
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


@works(
    LOOPS,
    "several optimisers for one model",
    "`attach([one, two], ...)`: each that holds block layers steps once in a step",
)
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
