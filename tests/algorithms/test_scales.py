"""Which blocks die does not depend on a layer's scale: ten times the weight and a tenth of the output give the same masks."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kronblocks import KronblocksWarning, LayerOverride, PenaltyConfig, ScheduleConfig, Sparsifier, SparsityConfig, sparsify_

STEPS = 20
WAYS: dict[str, dict[str, Any]] = {
    "two-phase": {"rank": 2},
    "two-phase, taylor": {"method": "two-phase", "rank": 2, "score": "taylor"},
    "magnitude": {"method": "magnitude"},
    "magnitude, packed": {"method": "magnitude", "storage": "packed"},
    "magnitude, packed, taylor": {"method": "magnitude", "storage": "packed", "score": "taylor"},
    "magnitude, regrowth": {"method": "magnitude", "regrow": 0.3},
    "iterative": {"method": "iterative"},
    "group-lasso": {"method": "group-lasso"},
    "group-lasso, fixed strength": {"method": "group-lasso", "penalty": PenaltyConfig(strength=1e-9)},
    "group-lasso, in the loss": {"method": "group-lasso", "penalty": PenaltyConfig(form="gradient")},
    "elastic-group-lasso": {"method": "elastic-group-lasso"},
    "kron-l1": {"method": "kron-l1", "rank": 2},
    "kron-l1, proximal": {"method": "kron-l1", "rank": 2, "penalty": PenaltyConfig(form="proximal")},
}


class Scaled(nn.Module):
    def __init__(self, linear: nn.Linear, scale: float) -> None:
        super().__init__()
        self.linear, self.scale = linear, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) / self.scale


def masks(scales: tuple[float, float, float], settings: dict[str, Any], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """After a training in which nothing but the algorithm changes the weights."""
    torch.manual_seed(0)
    linears = [nn.Linear(24, 32), nn.Linear(32, 24), nn.Linear(24, 16)]
    parts: list[nn.Module] = []
    for linear, scale in zip(linears, scales, strict=True):
        parts += [Scaled(linear, scale), nn.Tanh()]
    model = nn.Sequential(*parts[:-1]).to(dtype)
    sparsifier = sparsify_(model, SparsityConfig(target_sparsity=0.75, measure_plans=False, **settings))
    with torch.no_grad():
        for target, part, scale in zip(sparsifier.targets, parts[::2], scales, strict=True):
            assert isinstance(part, Scaled)
            first = "coeff" if target.is_factored else "values" if hasattr(target.module, "values") else "weight"
            for name in (first, "bias"):
                target.module.get_parameter(name).mul_(scale)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparsifier.attach(optimizer, total_steps=STEPS)
    for _ in range(STEPS):
        x = torch.randn(8, 24, dtype=dtype)
        optimizer.zero_grad()
        ((model(x) - x[:, :16]).square().mean() + sparsifier.penalty()).backward()
        optimizer.step()
    assert sparsifier.sparsity >= 0.75
    return [target.mask.clone() for target in sparsifier.targets]


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("sizes", ["equal", "unequal"])
@pytest.mark.parametrize("way", WAYS)
def test_masks_do_not_depend_on_a_layers_scale(way, sizes, scope):
    settings = {"block_size": 4, "scope": scope, "schedule": ScheduleConfig(update_every=2), **WAYS[way]}
    if sizes == "unequal":
        settings["overrides"] = {"2.*": LayerOverride(block_size=(8, 2)), "4.*": LayerOverride(block_size=2)}
    plain = masks((1.0, 1.0, 1.0), settings)
    assert all(bool(mask.any()) for mask in plain) and not all(bool(mask.all()) for mask in plain)
    for scales in ((10.0, 1.0, 1.0), (1.0, 1e-3, 1e3)):
        assert all(torch.equal(a, b) for a, b in zip(plain, masks(scales, settings), strict=True)), scales


class Block(nn.Module):
    """A transformer's second half; what writes into the residual stream begins smaller, as in GPT-2, or at zero."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        nn.init.normal_(self.up.weight, 0, 0.02)
        nn.init.normal_(self.down.weight, 0, 0.02 * scale)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def trained(method: str, scale: float, *, dtype: torch.dtype = torch.float32, **settings: Any) -> Sparsifier:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(32, scale) for _ in range(3))).to(dtype)
    config = SparsityConfig(method=method, block_size=4, target_sparsity=0.8, measure_plans=False, **settings)  # pyright: ignore[reportArgumentType]
    sparsifier = sparsify_(model, config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    sparsifier.attach(optimizer, total_steps=60)
    for _ in range(60):
        x = torch.randn(16, 32, dtype=dtype)
        optimizer.zero_grad()
        ((model(x) - x.roll(1, 1).sin()).square().mean() + sparsifier.penalty()).backward()
        optimizer.step()
    return sparsifier


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1 / math.sqrt(24), 0.0], ids=["GPT-2's start", "zero"])
@pytest.mark.parametrize("method", ["two-phase", "magnitude", "iterative", "group-lasso", "elastic-group-lasso", "kron-l1"])
def test_no_layer_of_a_transformer_starves(method, scale):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="pruning has ended")  # a layer may end between a quarter and a third
        sparsifier = trained(method, scale)
    report = sparsifier.report()
    mean = 1 - report.block_sparsity
    assert mean == pytest.approx(0.2, abs=0.01)
    for layer in report.layers:
        assert layer.live_blocks >= 0.25 * mean * layer.total_blocks, layer.name
    assert all(bool(torch.isfinite(parameter).all()) for parameter in sparsifier.model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_and_large_weights_of_half_precision_are_compared_all_the_same(dtype):
    """Their squares leave the range of the dtype."""
    half = [
        [mask.clone() for mask in masks((scale, 1.0, 1.0), {"method": "magnitude", "block_size": 4}, dtype)]
        for scale in (1.0, 2.0**-12, 2.0**10)
    ]
    assert all(torch.equal(a, b) for other in half[1:] for a, b in zip(half[0], other, strict=True))


def test_layers_far_below_the_others_are_named_when_pruning_ends():
    """By the loss a layer may starve; by norms it cannot."""

    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x) + 1e-6 * self.unused(x)

    def train(score: str) -> Sparsifier:
        torch.manual_seed(0)
        model = Unused()
        config = SparsityConfig(method="magnitude", block_size=4, target_sparsity=0.5, score=score)  # pyright: ignore[reportArgumentType]
        sparsifier = sparsify_(model, config)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        sparsifier.attach(optimizer, total_steps=STEPS)
        for _ in range(STEPS):
            optimizer.zero_grad()
            model(torch.randn(8, 32)).square().mean().backward()
            optimizer.step()
        return sparsifier

    with pytest.warns(
        KronblocksWarning, match=r"unused \(8 of 64 blocks\) kept less than a third of the mean density, 0\.500"
    ) as seen:
        report = train("taylor").report()
    assert len(seen) == 1 and 'scope="layer"' in str(seen[0].message)
    assert [layer.name for layer in report.starved] == ["unused"]
    assert "far below the mean density: unused" in str(report)
    report = train("norm").report()
    assert not report.starved and "far below" not in str(report)
