"""Optimisers: torch's own, and what others are made like."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from tests.helpers import STEPS
from tests.in_the_field.cases import limited, refused, works
from tests.in_the_field.trial import Trial, config, loss_of
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.optim import Optimizer

from kronblocks import BlockSparseLinear, parameter_groups
from kronblocks.core import PerformanceWarning

OPTIMISERS = "optimisers"
ROWWISE = ("Adadelta", "Adagrad", "Adam", "Adamax", "AdamW", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")


@works(OPTIMISERS, "all of torch.optim but LBFGS, SparseAdam, Muon", ", ".join(ROWWISE) + ", Adafactor")
def of_torch() -> None:
    rates = {"Adadelta": 1.0, "Adagrad": 0.02, "SGD": 0.3, "ASGD": 0.3, "Rprop": 1e-3}
    for name in (*ROWWISE, "Adafactor"):
        trial = Trial()
        more = {"momentum": 0.9} if name == "SGD" else {}
        optimizer = getattr(torch.optim, name)(trial.model.parameters(), lr=rates.get(name, 5e-3), **more)
        trial.attach(optimizer)
        trial.train(optimizer)


@works(OPTIMISERS, "foreach, fused, amsgrad, maximize", "as they are")
def variants() -> None:
    for settings in ({"foreach": True}, {"fused": True}, {"amsgrad": True}):
        trial = Trial()
        trial.train(trial.adam(**settings))
    trial = Trial()
    optimizer = torch.optim.SGD(trial.model.parameters(), lr=0.3, maximize=True)
    trial.attach(optimizer)
    while trial.sparsifier.step < STEPS:
        optimizer.zero_grad()
        (loss := -loss_of(trial.model)).backward()
        optimizer.step()
        trial.note(-loss)
    trial.check()


@limited(
    OPTIMISERS, "Muon (two-dimensional weights only)", "with methods on plain nn.Linear; factors and values have other shapes"
)
def muon() -> None:
    trial = Trial(settings=config("magnitude"))
    matrices = [p for p in trial.model.parameters() if p.dim() == 2]
    optimizers = [torch.optim.Muon(matrices, lr=2e-2), torch.optim.AdamW([p for p in trial.model.parameters() if p.dim() != 2])]
    trial.attach(optimizers)
    trial.train(*optimizers)
    with_factors = Trial()
    try:
        torch.optim.Muon([p for p in with_factors.model.parameters() if p.dim() != 1])
        raise AssertionError("Muon has learned to take factors: say so")
    except ValueError as error:
        assert "2D" in str(error)


class Shampooish(Optimizer):
    """State that is no row a block: one matrix for a whole parameter, and a list."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, flat = self.state[p], p.grad.flatten(1) if p.dim() > 1 else p.grad.unsqueeze(1)
                if not state:
                    state["statistics"], state["norms"] = torch.eye(flat.shape[0]) * 1e-3, [torch.zeros(flat.shape[0])]
                state["statistics"] += flat @ flat.T
                state["norms"][0] += flat.norm(dim=1)
                scaled = flat / (state["statistics"].diagonal().sqrt().unsqueeze(1) + 1e-6)
                p.sub_(group["lr"] * scaled.view_as(p))


class Prodigyish(Optimizer):
    """Keeps its starting point, and a slice of it flattened, as Prodigy does with `slice_p`."""

    def __init__(self, params: Iterable[Any], lr: float = 1.0) -> None:
        super().__init__(params, {"lr": lr, "d": 1e-2})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["p0"], state["s"] = p.flatten()[::11].clone(), torch.zeros_like(p.flatten()[::11])
                    state["exp_avg"] = torch.zeros_like(p)
                state["s"] += p.grad.flatten()[::11]
                state["exp_avg"].lerp_(p.grad, 0.1)
                p.sub_(group["lr"] * group["d"] * state["exp_avg"].sign())


def through(make: Callable[[Trial], Optimizer]) -> None:
    """Over the lift, and with live blocks that are given up at the end of pruning."""
    for settings in (config(), config("magnitude", storage="packed")):
        trial = Trial(settings=settings)
        optimizer = make(trial)
        trial.attach(optimizer)
        trial.train(optimizer)


class ScheduleFree(Optimizer):
    """SGD of which the weights are one sequence in training and another in evaluation."""

    def __init__(self, params: Iterable[Any], lr: float = 0.3) -> None:
        super().__init__(params, {"lr": lr, "k": 0, "train_mode": True})

    @torch.no_grad()
    def turn(self, train: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] != train:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.lerp_(self.state[p]["z"], 1 - 1 / 0.9 if not train else 0.1)
                group["train_mode"] = train

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            share = 1 / (group["k"] + 1)
            for p in group["params"]:
                if p.grad is not None:
                    z = self.state[p].setdefault("z", p.clone())
                    p.lerp_(z, share)
                    p.add_(p.grad, alpha=group["lr"] * (0.9 * (1 - share) - 1))
                    z.sub_(p.grad, alpha=group["lr"])
            group["k"] += 1


@works(OPTIMISERS, "schedule-free optimisers", "train() and eval() of the optimiser over the lift")
def schedule_free() -> None:
    trial = Trial()
    optimizer = ScheduleFree(trial.model.parameters())
    trial.attach(optimizer)
    while trial.sparsifier.step < STEPS:
        trial.step(optimizer)
        if trial.sparsifier.step % 10 == 0:
            optimizer.turn(train=False)
            assert torch.isfinite(loss_of(trial.model))
            optimizer.turn(train=True)
    optimizer.turn(train=False)
    trial.check()


class Lookahead(Optimizer):
    """Slow weights beside another optimiser's fast ones."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner, self.count = inner, 0
        self.slow = {p: p.detach().clone() for group in inner.param_groups for p in group["params"]}
        super().__init__([p for group in inner.param_groups for p in group["params"]], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.inner.step()
        self.count += 1
        if self.count % 5 == 0:
            for group in self.inner.param_groups:
                for p in group["params"]:
                    slow = self.slow.setdefault(p, p.detach().clone())
                    p.copy_(slow.lerp_(p, 0.5))


@works(OPTIMISERS, "Lookahead and others around an optimiser", "attach the outer one, whose `step()` the loop calls")
def lookahead() -> None:
    for method in ("two-phase", "magnitude"):
        trial = Trial(settings=config(method))
        optimizer = Lookahead(torch.optim.AdamW(parameter_groups(trial.model, lr=1e-2)))
        trial.attach(optimizer)
        trial.train(optimizer)


class Careful(torch.optim.SGD):
    """Two gradients in one step, each followed by a step of the base class."""

    def step(self, closure: Any = None) -> Any:
        loss = None
        for _ in range(2):
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            super().step()
        return loss


@works(OPTIMISERS, "optimisers whose step calls `super().step()`, once or more", "one step, however many are inside")
def derived() -> None:
    torch.optim.SGD([nn.Parameter(torch.zeros(1))])  # from now on torch runs hooks in the base class's steps, too
    for settings in (config(), config("kron-l1")):
        trial = Trial(settings=settings)
        optimizer = Careful(trial.model.parameters(), lr=0.05)
        trial.attach(optimizer, add_penalty=True)
        for number in range(STEPS):

            def evaluate(trial: Trial = trial, optimizer: Optimizer = optimizer) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(trial.model)
                loss.backward()
                return loss

            trial.note(optimizer.step(evaluate))
            assert trial.sparsifier.step == number + 1
        trial.check()


class Outside:
    """No torch optimiser: steps of its own."""

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        self.params = list(params)


@refused(OPTIMISERS, "objects that are no torch.optim.Optimizer", "derive from it", "torch optimiser")
def foreign() -> None:
    trial = Trial()
    trial.attach(Outside(trial.model.parameters()))


class NoInit(Optimizer):
    """Forgets super().__init__, and so runs no hooks."""

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": list(params), "lr": 0.1}]

    def step(self, closure: Any = None) -> Any: ...


@refused(OPTIMISERS, "optimisers whose steps run no hooks", "call `super().__init__(params, defaults)`", "run no hooks")
def no_hooks() -> None:
    trial = Trial()
    trial.attach(NoInit(trial.model.parameters()))


class Forms(Optimizer):
    """SGD that remembers things of every form: factored, sliced, quantised, preconditioners in lists."""

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            state = self.state[p]
            if not state:
                state.update(slice=p.flatten()[::11].clone(), byte=p.char(), squares=[torch.eye(size) for size in p.shape])
            assert state["byte"].shape == p.shape and len(state["slice"]) == -(-p.numel() // 11)
            assert [len(each) for each in state["squares"]] == list(p.shape)
            p.sub_(p.grad, alpha=0.1)


@limited(
    OPTIMISERS,
    "Prodigy, Shampoo, SOAP, Adalite, 8-bit: states in other forms than the parameter's",
    "dead slots keep their memory when pruning ends; a warning says so",
)
def of_other_forms() -> None:
    trial = Trial()
    optimizer = Forms(trial.model.parameters())
    trial.attach(optimizer)
    with pytest.warns(PerformanceWarning, match="keep the slots of dead blocks"):
        trial.train(optimizer)


def in_backward(trial: Trial) -> None:
    """Step each parameter as soon as its gradient is there, as torch's tutorial and torchtune do."""
    optimizers = {p: torch.optim.AdamW([p], lr=1e-2) for p in trial.model.parameters()}

    def step(parameter: torch.Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in trial.model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    trial.attach(list(optimizers.values()))


@works(
    OPTIMISERS,
    "one optimiser for each parameter, stepped in backward",
    "the same hook on every parameter",
)
def stepped_in_backward() -> None:
    for method in ("two-phase", "magnitude"):
        trial = Trial(settings=config(method))
        in_backward(trial)
        while trial.sparsifier.step < STEPS:
            loss = loss_of(trial.model)
            loss.backward()
            trial.note(loss)
        trial.check()


@refused(OPTIMISERS, "torch's `_apply_optimizer_in_backward`", "use `register_post_accumulate_grad_hook`", "stepped in backward")
def torchs_in_backward() -> None:
    trial = Trial()
    _apply_optimizer_in_backward(torch.optim.SGD, trial.model.parameters(), {"lr": 0.1})
    trial.attach([each for p in trial.model.parameters() for each in p._in_backward_optimizers])  # pyright: ignore[reportAttributeAccessIssue]


@works(OPTIMISERS, "rates for each part of a model", "a call of `parameter_groups` for each part, and the lists added up")
def rates_of_parts() -> None:
    trial = Trial()
    groups = parameter_groups(trial.model[0], lr=5e-3) + parameter_groups(trial.model[2], lr=2e-2)  # pyright: ignore[reportIndexIssue]
    optimizer = torch.optim.AdamW(groups)
    trial.attach(optimizer)
    trial.train(optimizer)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    values = [layer.values for layer in trial.model.modules() if isinstance(layer, BlockSparseLinear)]
    assert [rates[id(p)] for p in values] == pytest.approx([5e-3, 2e-2])


@works(OPTIMISERS, "hooks on parameters that clip or count gradients", "the same function on all of them, after `sparsify_`")
def hooks_on_parameters() -> None:
    trial = Trial()
    for p in trial.model.parameters():
        p.register_hook(lambda gradient: gradient.clamp(-1e-2, 1e-2))
    optimizer = torch.optim.SGD(trial.model.parameters(), lr=1.0)
    trial.attach(optimizer)
    trial.train(optimizer)
    assert all(float(p.grad.abs().max()) <= 1.001e-2 for p in trial.model.parameters() if p.grad is not None)


@works(OPTIMISERS, "one optimiser for each parameter, stepped after backward", "values join the one that held their factors")
def one_each() -> None:
    trial = Trial()
    optimizers = [torch.optim.AdamW([p], lr=1e-2) for p in trial.model.parameters()]
    trial.attach(optimizers)
    trial.train(*optimizers)


@works(OPTIMISERS, "state_dict of an optimiser, loaded over the lift", "after the sparsifier's and the model's")
def loaded() -> None:
    trial = Trial()
    optimizer = trial.adam()
    for _ in range(20):
        trial.step(optimizer)
    again = Trial()
    again.sparsifier.load_state_dict(trial.sparsifier.state_dict())
    again.model.load_state_dict(trial.model.state_dict())
    other = again.adam()
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, two in zip(trial.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(optimizer.state[one]["exp_avg"], other.state[two]["exp_avg"])
    again.train(other, falls=False)
