"""The rates of sparse layers: equations 23 to 27, and that outputs then change alike at every density."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor, nn

from kronblocks import SparsityConfig, parameter_groups, sparsify_
from kronblocks.algorithms.rates import Kind, Scales
from kronblocks.core.blocks import BlockGrid, BlockSize
from kronblocks.nn.base import BlockLayer
from kronblocks.ops.kron import kron_weight

GRID = BlockGrid(256, 256, BlockSize(16, 16))
DENSITIES = (0.05, 0.2, 1.0)


class Factors:
    """Random factors in float64 with some live blocks, a gradient of the weight, and what a step of each factor does."""

    def __init__(self, density: float, kind: Kind, rank: int = 8, banks: int = 16, aligned: bool = False) -> None:
        torch.manual_seed(0)
        layer, live = nn.Module(), int(density * GRID.blocks)
        mask = (torch.randperm(GRID.blocks) < live).view(GRID.shape)
        tiles = torch.linalg.qr(torch.randn(banks, 256, rank, dtype=torch.float64)).Q.transpose(1, 2).reshape(banks, rank, 16, 16)
        coeff = torch.randn(16, 16, rank, dtype=torch.float64) * mask.unsqueeze(-1)
        layer.coeff, layer.tiles = nn.Parameter(0.1 * coeff), nn.Parameter(3 * tiles)
        self.coeff, self.tiles, self.mask = layer.coeff.detach(), layer.tiles.detach(), mask
        span = kron_weight(torch.randn(16, 16, rank, dtype=torch.float64), self.tiles)
        self.gradient = span if aligned else torch.randn(256, 256, dtype=torch.float64)
        scales = Scales.of(layer, GRID, live)
        self.rates = {name: scales.factor(name, kind, GRID, rank, banks) for name in ("coeff", "tiles")}
        blocks = GRID.to_blocks(self.gradient) * mask[..., None, None]
        each = self.tiles.repeat_interleave(16 // banks, 0)
        d_coeff = torch.einsum("pqab,piab->pqi", blocks, each)
        d_tiles = torch.einsum("pqi,pqab->piab", self.coeff, blocks).unflatten(0, (banks, 16 // banks)).sum(1)
        sized = torch.sign if kind == "adam" else torch.clone
        self.changes = {
            "coeff": kron_weight(self.rates["coeff"] * sized(d_coeff), self.tiles),
            "tiles": kron_weight(self.coeff, self.rates["tiles"] * sized(d_tiles)),
        }
        dense = sized(self.gradient)
        total = (self.gradient * dense).sum()
        self.gains = {name: float((self.gradient * each).sum() / total) for name, each in self.changes.items()}


@pytest.mark.parametrize("density", DENSITIES)
def test_a_step_of_live_values_lowers_the_loss_as_a_dense_step_does(density):
    torch.manual_seed(0)
    gradient, live = torch.randn(256, 256, dtype=torch.float64), int(density * GRID.blocks)
    mask = GRID.expand((torch.randperm(GRID.blocks) < live).view(GRID.shape))
    rate = Scales(live).factor("values", "adam", GRID)
    assert rate == Scales(live).factor("weight", "sgd", GRID) == GRID.blocks / live
    # sums over 12 blocks or more of 256 entries each: 2% of standard deviation
    assert float(rate * gradient[mask].abs().sum() / gradient.abs().sum()) == pytest.approx(1, rel=0.08)
    assert float(rate * gradient[mask].square().sum() / gradient.square().sum()) == pytest.approx(1, rel=0.12)


@pytest.mark.parametrize("density", DENSITIES)
def test_a_step_of_factors_changes_live_blocks_as_a_step_of_live_values_does(density):
    """Whatever the scale of tiles and coefficients."""
    factors = Factors(density, "adam")
    live = GRID.expand(factors.mask)
    for change in factors.changes.values():
        # at 0.05 a bank has 0 to 3 live blocks, and those of fuller banks change less
        assert float(change[live].square().mean().sqrt()) * density == pytest.approx(1, rel=0.25 if density < 0.1 else 0.05)
        assert not change[~live].any()


def test_what_a_step_of_factors_gains_depends_on_the_gradient_as_documented():
    random, aligned = Factors(1.0, "adam").gains, Factors(1.0, "adam", aligned=True).gains
    assert random["coeff"] == pytest.approx(math.sqrt(8 / 256), rel=0.1)
    assert random["tiles"] == pytest.approx(math.sqrt(8 / (16 + 2 / math.pi * 7)), rel=0.1)
    assert 0.8 < aligned["coeff"] < 1.25


@pytest.mark.parametrize("density", DENSITIES)
def test_gradient_descent_on_factors_gains_as_much_as_on_the_weight(density):
    found = Factors(density, "sgd", aligned=True).gains["coeff"]
    assert found == pytest.approx(1, rel=0.35 if density < 0.1 else 0.1)  # of the 12 blocks that live at 0.05


def test_gradient_descent_on_tiles_gains_as_much_if_gradients_agree_with_coefficients():
    factors = Factors(1.0, "sgd", banks=1)
    agreeing = kron_weight(factors.coeff, torch.randn(1, 8, 16, 16, dtype=torch.float64))
    blocks = GRID.to_blocks(agreeing)
    d_tiles = torch.einsum("pqi,pqab->iab", factors.coeff, blocks).unsqueeze(0)
    change = kron_weight(factors.coeff, factors.rates["tiles"] * d_tiles)
    assert float((agreeing * change).sum() / agreeing.square().sum()) == pytest.approx(1, rel=0.15)  # nearly orthogonal


def test_plain_rates_dead_layers_and_unknown_parameters_have_no_multiple():
    assert Scales(10).factor("values", "plain", GRID) == Scales(0).factor("values", "adam", GRID) == 1.0
    assert Scales(10).factor("anything", "adam", GRID) == 1.0


WAYS = ("static", "rigl", "static, nn.Linear", "magnitude", "two-phase", "two-phase, lifted")


@functools.cache
def changes(way: str, density: float, rates: str) -> tuple[float, float]:
    """Root mean squares of a layer's outputs at first, and of their change in 3 steps of Adam."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 8))
    lr = 1e-3
    if way == "dense" or density == 1:
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    else:
        method, _, more = way.partition(", ")
        starts_sparse = method in ("static", "rigl")
        settings = {"storage": "dense" if more == "nn.Linear" else "packed"} if method != "two-phase" else {}
        settings |= {"block_size": 16, "exclude": ("0", "4"), "measure_plans": False, "heads": ()}
        config = SparsityConfig(method=method, target_sparsity=1 - density, **settings)
        sparsifier = sparsify_(model, config)
        if not starts_sparse:
            live = round(density * GRID.blocks)
            sparsifier.targets[0].layer.set_block_mask_((torch.randperm(GRID.blocks) < live).view(GRID.shape))
        if more == "lifted":
            sparsifier.lift_()
        optimizer = torch.optim.Adam(parameter_groups(model, lr=lr, rates=rates))  # pyright: ignore[reportArgumentType]
        sparsifier.attach(optimizer, total_steps=1000)
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    seen: list[Tensor] = []
    model[2].register_forward_hook(lambda _, __, output: seen.append(output.detach()))
    for _ in range(4):
        loss = (model(x) - x[:, :8].sin()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert density == 1 or isinstance(model[2], BlockLayer) or way == "static, nn.Linear"
    return float(seen[0].square().mean().sqrt()), float((seen[-1] - seen[0]).square().mean().sqrt())


@pytest.mark.parametrize("way", WAYS)
def test_outputs_change_alike_at_every_density(way):
    dense = changes("dense", 1.0, "auto")[1]
    most = 2.5 if way == "two-phase" else 2  # the steps of coefficients and tiles add up
    for density in (0.05, 0.2, 0.5):
        assert 0.5 < changes(way, density, "auto")[1] / dense < most
    if way != "two-phase":
        assert changes(way, 0.05, "plain")[1] / dense < 0.3  # without the multiples


@pytest.mark.parametrize("way", ["static", "rigl", "static, nn.Linear"])
@pytest.mark.parametrize("density", DENSITIES)
def test_random_blocks_begin_with_outputs_as_large_as_the_dense_layers(way, density):
    dense = changes("dense", 1.0, "auto")[0]
    assert changes(way, density, "auto")[0] / dense == pytest.approx(1, rel=0.25)  # 12 blocks at 0.05: some inputs count twice
