"""Odd models, and examples of any kind: refused, the model as it was to the bit; or trained, or exported, as asked for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import check_layers_agree
from tests.reliability.fuzzing import (
    QUIET,
    VALUES,
    Tally,
    bits,
    cases,
    check_sparsity,
    everything,
    refused,
    small,
)
from torch import Tensor, nn

from kronblocks import SparsityConfig, parameter_groups, sparsify_
from kronblocks.algorithms.training.sparsifier import Sparsifier
from kronblocks.deploy import export

pytestmark = pytest.mark.slow

STEPS = 8
METHODS = ["two-phase", "kron-l1", "group-lasso", "magnitude", "rigl", "static"]


class Odd(nn.Module):
    """A model of odd parts."""

    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)


def part(kind: str, out: int, into: int) -> nn.Module:
    if kind == "nan":
        layer = nn.Linear(into, out)
        nn.init.constant_(layer.weight, float("nan"))
        return layer
    makers = {
        "linear": lambda: nn.Linear(into, out),
        "meta": lambda: nn.Linear(into, out, device="meta"),
        "lazy": lambda: nn.LazyLinear(out),
        "conv": lambda: nn.Conv2d(into, out, 3),
        "grouped": lambda: nn.Conv1d(into, into * out, 3, groups=into),
        "attention": lambda: nn.MultiheadAttention(4 * out, 4),
        "embedding": lambda: nn.Embedding(into, out),
        "subclass": lambda: nn.modules.linear.NonDynamicallyQuantizableLinear(into, out),
        "half": lambda: nn.Linear(into, out).half(),
        "nested": lambda: nn.Sequential(nn.Linear(into, out), nn.ReLU()),
        "spectral": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(into, out)),
    }
    return makers[kind]()


NOT_RUN = ("nan", "meta", "lazy")
KINDS = ["linear", "linear", "conv", "grouped", "attention", "embedding", "subclass", "half", "nested", "spectral", *NOT_RUN]
PARTS = st.tuples(st.sampled_from(KINDS), st.sampled_from([1, 3, 4, 8, 12, 16, 24]), st.sampled_from([2, 4, 7, 8, 16, 24]))


def loss_of(kind: str, part: nn.Module, out: int, into: int) -> Tensor:
    """The mean square of what a part makes of an input that it can use."""
    match kind:
        case "embedding":
            found = part(torch.randint(into, (4,)))
        case "attention":
            found = part(*[torch.randn(2, 3, 4 * out)] * 3)[0]
        case "conv" | "grouped":
            found = part(torch.randn(2, into, *[5] * (2 if kind == "conv" else 1)))
        case _:
            found = part(torch.randn(4, into, dtype=torch.float16 if kind == "half" else None))
    return found.float().square().mean()


def check_rest(model: nn.Module, before: nn.Module, taken: list[str]) -> None:
    """What was not selected is as it was."""
    chosen = {id(before.get_submodule(name.removesuffix(".linear"))) for name in taken}
    inside = tuple(f"{name}." for name, each in before.named_modules(remove_duplicate=False) if id(each) in chosen)
    state = model.state_dict()
    for name, value in before.state_dict().items():
        if not name.startswith(inside):
            assert bits(state[name]) == bits(value), name


def test_sparsify_odd_models(record):
    tally = Tally()

    @settings(max_examples=cases(120, 3000), **QUIET)
    @given(
        st.lists(PARTS, min_size=1, max_size=4),
        st.sampled_from(METHODS),
        st.sampled_from(["1", "2x3", "4", "4", "8", "16", "64"]),
        (st.floats(0, 0.99) | st.floats(0, 0.6)).map(lambda share: round(share, 4)),
        st.booleans(),
        st.sampled_from(["dense", "nearest"]),
        st.sampled_from([(), (), ("parts.0",), ("re:parts.*",), ("re:(",), ("type:Linear",)]),
    )
    def run(parts, method, block, sparsity, tied, mismatch, exclude):
        model = Odd([part(*each) for each in parts])
        if tied and len(parts) > 1:
            model.parts.append(model.parts[0])
        before, copied = everything(model), copy.deepcopy(model)
        made: list[Sparsifier] = []

        def attempt() -> None:
            chosen = SparsityConfig(
                method=method,
                block_size=block,
                target_sparsity=sparsity,
                on_mismatch=mismatch,
                exclude=exclude,
                convolutions=True,
            )
            made.append(sparsify_(model, chosen))

        if refused(attempt):
            tally.refused += 1
            assert everything(model) == before
            return
        tally.accepted += 1
        (sparsifier,) = made
        check_rest(model, copied, [target.name for target in sparsifier.targets])
        if not any(kind in NOT_RUN for kind, _, _ in parts):
            train(model, parts, sparsifier)
            check_sparsity(model, sparsifier, sparsity)
            check_layers_agree(model)

    run()
    tally.check(1 / 8)
    record(
        "odd models",
        f"{tally.tried:,} of random layers, some tied, lazy, on no device or not finite",
        f"{tally.refused:,} refused, the model as it was, bit for bit; in the other {tally.accepted:,} what was not selected "
        "stayed as it was, and those that can compute were trained to exactly the sparsity asked for",
    )


def train(model: Odd, parts: list[tuple[str, int, int]], sparsifier: Sparsifier) -> None:
    """A few steps, with a loss of each part."""
    optimizer = torch.optim.SGD(parameter_groups(model, lr=1e-3, weight_decay=0.0))
    sparsifier.attach(optimizer, total_steps=STEPS)
    for _ in range(STEPS):
        described = zip(model.parts, [*parts, parts[0]][: len(model.parts)], strict=True)
        losses = [loss_of(kind, each, out, into) for each, (kind, out, into) in described]
        loss = torch.stack(losses).sum() + sparsifier.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_export_with_any_example(record):
    tally = Tally()
    model = small().eval()
    sparsify_(model, SparsityConfig(block_size=4, method="static", target_sparsity=0.5))
    shapes = st.lists(st.integers(0, 20), max_size=4) | st.lists(st.integers(0, 5), max_size=2).map(lambda shape: [*shape, 16])
    dtypes = st.sampled_from([torch.float32, torch.float32, torch.float32, torch.int64, torch.bool])
    tensors = st.builds(lambda shape, dtype: torch.randn(shape).to(dtype), shapes, dtypes)
    examples = st.one_of(
        tensors, tensors, VALUES, st.tuples(tensors), st.dictionaries(st.sampled_from(["input", "x"]), tensors, max_size=2)
    )
    before = everything(model)

    @settings(max_examples=cases(120, 1500), **QUIET)
    @given(examples, st.sampled_from(["auto", "dense", "packed", "bsr", "none"]))
    def run(example, form):
        made: list[Any] = []
        with torch.random.fork_rng():
            rejected = refused(lambda: made.append(export(model, example, form=form, slim=False)))
        assert everything(model) == before
        if rejected:
            tally.refused += 1
            return
        tally.accepted += 1
        exported = made[0].model
        with torch.no_grad():
            for x in (called(example), torch.randn(7, 16)):
                assert torch.allclose(exported(x), model(x), rtol=1e-4, atol=1e-5)
        if form == "dense":
            assert [type(layer) for layer in exported] == [nn.Linear, nn.ReLU, nn.Linear]

    run()
    tally.check(1 / 10)
    record(
        "export with any example",
        f"{tally.tried:,} tensors and values of any shape and kind",
        f"{tally.refused:,} refused with one sentence; the other {tally.accepted:,} gave models with the outputs of the "
        "trained one, which was left as it was, bit for bit",
    )


def called(example: Any) -> Tensor:
    """The tensor that the model gets for an example."""
    if isinstance(example, dict):
        return next(iter(example.values()))
    return example[0] if isinstance(example, tuple) else example
