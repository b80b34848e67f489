"""Averages of weights: of one training over time, and of several models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.helpers import STEPS, check_layers_agree
from tests.in_the_field.cases import limited, works
from tests.in_the_field.trial import Trial, batch, config, mlp, same_output, trained
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn, update_bn

from kronblocks import KronblocksError, densify_, from_pretrained, save_pretrained
from kronblocks.nn.base import BlockLayer

AVERAGES = "averages"
KINDS: dict[str, Any] = {"EMA": get_ema_multi_avg_fn(0.9), "SWA": get_swa_multi_avg_fn()}


def check_average(average: nn.Module, wanted: list[Tensor], model: nn.Module) -> None:
    """The dense weights are the average of the training's, dead blocks are zero, and the layers compute with them."""
    check_layers_agree(average)
    layers = [layer for layer in average.modules() if isinstance(layer, BlockLayer)]
    for layer, weight, other in zip(layers, wanted, (m for m in model.modules() if isinstance(m, BlockLayer)), strict=True):
        assert torch.allclose(layer.dense_weight(), weight, rtol=1e-4, atol=1e-6)
        assert torch.equal(layer.block_mask, other.block_mask)


def weights(model: nn.Module) -> list[Tensor]:
    return [m.dense_weight().detach().clone() for m in model.modules() if isinstance(m, BlockLayer)]


def averaged_in_heal(use_buffers: bool, folder: Any, kind: str) -> None:
    trial = Trial()
    optimizer = trial.adam()
    average, wanted, count = None, [], 0
    while trial.sparsifier.step < STEPS:
        trial.step(optimizer)
        if trial.sparsifier.phase == "heal":
            average = average or AveragedModel(trial.model, multi_avg_fn=KINDS[kind], use_buffers=use_buffers)
            average.update_parameters(trial.model)
            now, count = weights(trial.model), count + 1
            share = 0.9 if kind == "EMA" else 1 - 1 / count
            wanted = [share * old + (1 - share) * new for old, new in zip(wanted, now, strict=True)] if wanted else now
    assert average is not None
    check_average(average.module, wanted, trial.model)
    assert same_output(from_pretrained(save_pretrained(average.module, folder / kind), mlp), average.module.eval())


@works(AVERAGES, "AveragedModel from phase `heal`, EMA and SWA", "the layers are final then")
def from_heal(folder: Any) -> None:
    for name in KINDS:
        averaged_in_heal(False, folder, name)


@limited(
    AVERAGES,
    "AveragedModel with `use_buffers=True`, from `heal`",
    "EMA; torch cannot divide whole numbers for SWA, BatchNorm's neither",
)
def from_heal_with_buffers(folder: Any) -> None:
    averaged_in_heal(True, folder, "EMA")
    with pytest.raises(RuntimeError, match="Integer division"):
        averaged_in_heal(True, folder, "SWA")


def averaged_from_the_start(method: str, use_buffers: bool, **settings: Any) -> None:
    trial = Trial(settings=config(method, **settings))
    optimizer = trial.adam()
    average = AveragedModel(trial.model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
    while trial.sparsifier.step < STEPS:
        trial.step(optimizer)
        average.update_parameters(trial.model)
    check_layers_agree(average.module)
    trial.check()
    dense = copy.deepcopy(average.module)
    densify_(dense)
    assert same_output(average.module, dense)
    x = batch(64)[0]
    far, size = (average.module(x) - trial.model(x)).norm(), trial.model(x).norm()
    assert far < 0.3 * size, "an average of the last steps is near to the model"


@works(
    AVERAGES, "AveragedModel from the start, methods on plain nn.Linear", "dead blocks of the average fade; prune it at the end"
)
def from_the_start_dense() -> None:
    averaged_from_the_start("magnitude", True)


@works(AVERAGES, "AveragedModel from the start, live blocks only (rigl, static)", "with `use_buffers=False`, torch's default")
def from_the_start_packed() -> None:
    averaged_from_the_start("rigl", False)
    averaged_from_the_start("static", False)
    averaged_from_the_start("static", True)


@limited(AVERAGES, "the same with `use_buffers=True` and rigl", "an average of two patterns is refused where it is called")
def from_the_start_of_two_patterns() -> None:
    with pytest.raises(KronblocksError, match="use_buffers=False"):
        averaged_from_the_start("rigl", True)


@limited(AVERAGES, "AveragedModel from the start over the lift", "torch's error about sizes at the lift: begin in `heal`")
def from_the_start_two_phase() -> None:
    with pytest.raises(RuntimeError, match="size of tensor"):
        averaged_from_the_start("two-phase", False)


@works(AVERAGES, "ModelEma of timm: all of `state_dict()`, integers too", "from `heal`")
def model_ema() -> None:
    trial = trained(steps=STEPS - 10)
    (optimizer,) = trial.sparsifier._optimizers
    ema = copy.deepcopy(trial.model).eval()
    wanted = weights(trial.model)
    while trial.sparsifier.step < STEPS:
        trial.step(optimizer)
        with torch.no_grad():
            for old, new in zip(ema.state_dict().values(), trial.model.state_dict().values(), strict=True):
                old.copy_(0.7 * old + 0.3 * new)
        wanted = [0.7 * old + 0.3 * new for old, new in zip(wanted, weights(trial.model), strict=True)]
    check_average(ema, wanted, trial.model)


@limited(
    AVERAGES, "target networks (`deepcopy`, then Polyak steps)", "copy again when layers are replaced: at the lift, and in `heal`"
)
def target_network() -> None:
    trial = Trial()
    optimizer = trial.adam()
    target, phase = copy.deepcopy(trial.model), trial.sparsifier.phase
    while trial.sparsifier.step < STEPS:
        trial.step(optimizer)
        if trial.sparsifier.phase != phase:
            target, phase = copy.deepcopy(trial.model), trial.sparsifier.phase
        with torch.no_grad():
            for old, new in zip(target.parameters(), trial.model.parameters(), strict=True):
                old.lerp_(new, 0.5)
    check_layers_agree(target)
    assert (target(x := batch(64)[0]) - trial.model(x)).norm() < 0.1 * trial.model(x).norm()


@limited(AVERAGES, "target networks that are not copied again", "torch's error about sizes in the step after the lift")
def target_network_of_factors() -> None:
    trial = Trial()
    optimizer = trial.adam()
    target = copy.deepcopy(trial.model)
    with pytest.raises(RuntimeError, match=r"size of tensor|shape"), torch.no_grad():
        while trial.sparsifier.step < STEPS:
            with torch.enable_grad():
                trial.step(optimizer)
            for old, new in zip(target.parameters(), trial.model.parameters(), strict=False):
                old.lerp_(new, 0.5)
    assert trial.sparsifier.phase == "refine"


def mean_of(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """As federated learning and soups do it."""
    return {name: torch.stack([state[name].float() for state in states]).mean(0).to(states[0][name].dtype) for name in states[0]}


@works(AVERAGES, "federated averaging of state_dicts", "of clients with one mask (in `heal`)")
def federated() -> None:
    server = trained().model
    clients = [copy.deepcopy(server) for _ in range(3)]
    for seed, client in enumerate(clients):
        torch.manual_seed(seed)
        optimizer = torch.optim.SGD(client.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            client(batch()[0]).square().mean().backward()
            optimizer.step()
    wanted = [torch.stack(each).mean(0) for each in zip(*map(weights, clients), strict=True)]
    again = copy.deepcopy(server)
    again.load_state_dict(mean_of([client.state_dict() for client in clients]))
    check_average(again, wanted, server)


@works(AVERAGES, "model soup", "of models with one mask: the same state of a sparsifier, trained on")
def soup() -> None:
    one = trained().model
    other = copy.deepcopy(one)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    mixed = copy.deepcopy(one)
    mixed.load_state_dict(mean_of([one.state_dict(), other.state_dict()]))
    check_average(mixed, [1.25 * weight for weight in weights(one)], one)


@works(AVERAGES, "an average swapped in for validation, and out again", "by `state_dict()` or by `.data`, in `heal`")
def swapped() -> None:
    trial = trained(steps=STEPS - 10)
    (optimizer,) = trial.sparsifier._optimizers
    average = {name: value.clone() for name, value in trial.model.state_dict().items()}
    while trial.sparsifier.step < STEPS:
        trial.step(optimizer)
        for name, value in trial.model.state_dict().items():
            if value.is_floating_point():
                average[name].mul_(0.5).add_(value, alpha=0.5)
        kept, before = copy.deepcopy(trial.model.state_dict()), weights(trial.model)
        trial.model.load_state_dict(average)
        check_layers_agree(trial.model)
        trial.model.load_state_dict(kept)
        for p in trial.model.parameters():
            p.data, p.saved = p.data.clone().zero_(), p.data
        assert not trial.model[0](torch.randn(2, 32)).any()
        for p in trial.model.parameters():
            p.data = p.saved
        assert all(torch.equal(a, b) for a, b in zip(before, weights(trial.model), strict=True))
        check_layers_agree(trial.model)
    trial.check(falls=False)


@works(AVERAGES, "update_bn of an averaged model", "as it is")
def batch_norm() -> None:
    trial = Trial(nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 16)))
    trial.train(trial.adam())
    average = AveragedModel(trial.model)
    average.update_parameters(trial.model)
    update_bn([batch()[0] for _ in range(3)], average)
    assert average.module[1].num_batches_tracked == 3
    check_layers_agree(average.module)
