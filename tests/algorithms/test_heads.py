"""The layers that make the model's output are found by where their outputs go, not by where they are defined."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from kronblocks import KronblocksError, Sparsifier, SparsityConfig, parameter_groups, sparsify_

STEPS = 12
CONFIG: dict[str, Any] = {"method": "magnitude", "block_size": 4, "target_sparsity": 0.5}


class HeadFirst(nn.Module):
    """Defines its head before its body."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 8)
        self.body: nn.Module = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = HeadFirst().body

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Residual(nn.Module):
    """Every layer's output reaches the model's through sums."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(16, 8)
        self.ups, self.downs = (nn.ModuleList(nn.Linear(16, 16) for _ in range(2)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.ups, self.downs, strict=True):
            x = x + down(up(x).relu())
        return self.out(x)


class Tasks(nn.Module):
    """Two tasks by turns, whose heads have their own last activations."""

    def __init__(self) -> None:
        super().__init__()
        self.tasks = nn.ModuleDict({name: nn.Linear(16, 8) for name in ("depth", "class")})
        self.stem = nn.Linear(16, 16)
        self.turn = 0

    def forward(self, x: Tensor) -> Tensor:
        self.turn += 1
        return self.tasks["depth" if self.turn % 2 else "class"](self.stem(x).relu()).tanh()


class Recurrent(nn.Module):
    """Its output is fed back, so every layer leads to every other."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.state = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.out(self.state(x).tanh())
        return x


class Translator(nn.Module):
    """An encoder defined after the decoder, and a dense layer in between."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder, self.encoder = nn.Linear(16, 8), nn.Linear(16, 16)
        self.bridge = nn.Conv1d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.bridge(self.encoder(x).unsqueeze(-1)).squeeze(-1))


class Checkpointed(HeadFirst):
    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        body = checkpoint(self.body, x.requires_grad_(), use_reentrant=self.reentrant)
        assert isinstance(body, Tensor)
        return self.head(body)


class Reentrant(Checkpointed):
    reentrant = True


class Towers(nn.Module):
    """Two outputs, compared in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text, self.stem = nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.image(self.stem(x)) * self.text(x).detach() + self.text(x)


def train(model: nn.Module, call: Callable[[Tensor], Tensor] | None = None, steps: int = STEPS, **settings: Any) -> Sparsifier:
    sparsifier = sparsify_(model, SparsityConfig(**{**CONFIG, **settings}))
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2))
    sparsifier.attach(optimizer, total_steps=STEPS)
    for _ in range(steps):
        x = torch.randn(8, 16)
        optimizer.zero_grad()
        ((call or model)(x).square().mean() + sparsifier.penalty()).backward()
        optimizer.step()
    return sparsifier


FOUND = {
    HeadFirst: ("head",),
    Residual: ("out",),
    Tasks: ("tasks.depth", "tasks.class"),
    Recurrent: ("out",),
    Translator: ("decoder",),
    Checkpointed: ("head",),
    Reentrant: ("head",),
    Towers: ("image", "text"),
}


@pytest.mark.parametrize("method", ["magnitude", "two-phase", "group-lasso", "rigl"])
@pytest.mark.parametrize("kind", FOUND, ids=lambda kind: kind.__name__)
def test_heads_are_found_by_where_outputs_go(kind, method):
    torch.manual_seed(0)
    model = kind()
    report = train(model, method=method).report()
    assert (report.heads, report.heads_from) == (FOUND[kind], "traced")
    assert f"a block in: {', '.join(FOUND[kind])} (traced)" in str(report)
    assert not [name for name, module in model.named_modules() if module._forward_pre_hooks or module._forward_hooks]


@pytest.mark.parametrize("method", ["magnitude", "two-phase", "group-lasso", "rigl"])
def test_no_output_is_lost_wherever_the_head_is_defined(method):
    torch.manual_seed(0)
    model = HeadFirst()
    with torch.no_grad():
        model.head.weight[4:] *= 1e-3  # the second block row is by far the weakest of its layer
    sparsifier = train(model, method=method, target_sparsity=0.85, **({"init": "nearest"} if method == "two-phase" else {}))
    mask = next(target.mask for target in sparsifier.targets if target.name == "head")
    assert mask.any(1).all()


def test_a_dense_layer_that_makes_the_output_leaves_no_head_among_the_targets():
    report = train(HeadFirst(), exclude=("head",)).report()
    assert (report.heads, report.heads_from) == ((), "traced")
    assert "a block in: no layer (traced)" in str(report)


def test_named_heads_count_and_are_checked():
    assert train(Residual(), heads=("downs.*", "out")).report().heads == ("out", "downs.0", "downs.1")
    assert train(HeadFirst(), heads="head", exclude=("head",)).report().heads == ()  # it is dense, so nothing is to be kept
    with pytest.raises(KronblocksError, match="heads pattern 'haed' matches no nn.Linear layer; there are head"):
        sparsify_(HeadFirst(), SparsityConfig(**CONFIG, heads=("haed",)))
    with pytest.raises(KronblocksError, match="layers, exclude and heads are patterns"):
        SparsityConfig(**CONFIG, heads=3)  # pyright: ignore[reportArgumentType]
    config = SparsityConfig(**CONFIG, heads=("head", nn.Linear))
    assert SparsityConfig.from_json(config.to_json()) == config


def test_a_model_that_cannot_be_traced_says_so_in_its_report():
    class Opaque(HeadFirst):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return self.head(self.body(x))

    opaque = Opaque()
    report = train(opaque, lambda x: opaque(x) + opaque.head.bias).report()
    assert (report.heads, report.heads_from) == (("body.2",), "defined last")


@pytest.mark.parametrize("whole", [True, False], ids=["the model", "its body"])
def test_a_compiled_model_is_traced_in_one_step_that_runs_uncompiled(whole):
    torch.compiler.reset()
    torch.manual_seed(0)
    model, compiled = HeadFirst(), []
    model.body = Body()

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    sparsifier = sparsify_(model, SparsityConfig(**CONFIG))
    if whole:
        call = torch.compile(model, backend=backend, fullgraph=True)
    else:
        model.body.compile(backend=backend, fullgraph=True)
        call = model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsifier.attach(optimizer, total_steps=STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        call(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
    assert sparsifier.report().heads == ("head",)
    assert len(compiled) == 1  # hooks that stay, and go to nothing, cost no second compilation
    torch.compiler.reset()


def test_what_was_found_is_saved_and_goes_on():
    torch.manual_seed(0)
    sparsifier = train(HeadFirst(), steps=6)
    state = copy.deepcopy(sparsifier.state_dict())
    assert state["heads"] == {"names": ["head"], "source": "traced"}
    again = sparsify_(HeadFirst(), SparsityConfig(**CONFIG))
    again.load_state_dict(state)
    assert again.report().heads == ("head",)
    named = sparsify_(HeadFirst(), SparsityConfig(**CONFIG, heads=("body.0",)))
    named.load_state_dict(state)
    assert named.report().heads == ("body.0",)  # the user's word counts
    older = sparsify_(HeadFirst(), SparsityConfig(**CONFIG))
    older.load_state_dict({name: part for name, part in state.items() if name != "heads"})
    assert older.report().heads_from is None
    with pytest.raises(KronblocksError, match="part on heads is damaged"):
        again.load_state_dict({**state, "heads": {"names": [3]}})


def test_copies_of_a_watched_model_and_detached_ones_have_no_part_in_it():
    model = HeadFirst()
    sparsifier = sparsify_(model, SparsityConfig(**CONFIG))
    handle = sparsifier.attach(torch.optim.AdamW(model.parameters(), lr=1e-2), total_steps=STEPS)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))  # noqa: S301 (made here)
    twin(torch.randn(8, 16)).sum().backward()
    assert sparsifier.report().heads_from is None
    handle.remove()
    assert not [module for module in model.modules() if module._forward_pre_hooks or module._forward_hooks]


@pytest.mark.parametrize("init", ["random", "nearest"])
@pytest.mark.parametrize("method", ["rigl", "static"])
def test_blocks_chosen_before_any_step_leave_no_row_of_what_may_be_a_head_empty(method, init):
    """Nobody knows then which layer is the head; how many blocks a layer has stays what its budget says."""
    config = SparsityConfig(method=method, block_size=2, target_sparsity=0.8, init=init)
    for seed in range(5):
        torch.manual_seed(seed)
        sparsifier = sparsify_(HeadFirst(), config)
        assert all(target.mask.any(1).all() for target in sparsifier.targets if target.name != "body.0")  # body.2 follows it
        live = [int(target.mask.sum()) for target in sparsifier.targets]
        torch.manual_seed(seed)
        named = sparsify_(HeadFirst(), dataclasses.replace(config, heads=("head",)))
        assert [int(target.mask.sum()) for target in named.targets] == live
        assert named.targets[0].mask.any(1).all()


def test_frozen_layers_below_are_no_heads():
    model = HeadFirst()
    sparsifier = sparsify_(model, SparsityConfig(**CONFIG))
    model.body.requires_grad_(False)
    assert [target.name for target in sparsifier.targets] == ["head", "body.0", "body.2"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsifier.attach(optimizer, total_steps=STEPS)
    for _ in range(STEPS):
        functional.mse_loss(model(torch.randn(8, 16)), torch.zeros(8, 8)).backward()
        optimizer.step()
    assert sparsifier.report().heads == ("head",)
