"""Nothing wrong gets through the check that comes before the timing."""

from __future__ import annotations

import pytest
import torch

from kronblocks import KronblocksError
from kronblocks.ops import BlockGrid, BlockSize
from kronblocks_lab.bench.cases import grid as grids
from kronblocks_lab.bench.cases import ways as ways
from kronblocks_lab.bench.cases.grid import Operands
from kronblocks_lab.bench.cases.grids import Group, OpsSettings

GROUP = Group((24, 32), BlockSize(4, 8), 0.5, 20)
GRID = GROUP.grid
MASK = ways.random_mask(GRID, 0.5, torch.Generator().manual_seed(1))


@pytest.fixture
def operands():
    return Operands(GROUP, OpsSettings(), inference=False)


def all_cases():
    found = [ways.dense_case(GRID, 20, "cpu")]
    layers = [("values", ways.values_layer(GRID, MASK, "cpu"))]
    layers += [(f"{rank}{rows}", ways.factors_layer(GRID, MASK, rank, rows, "cpu")) for rank in (1, 3) for rows in (False, True)]
    for name, layer in layers:
        found += [ways.layer_case(name, layer, plan, 20) for plan in ways.plans_of(layer)]
        if layer.tile_groups == 1 and layer.rank is not None:
            found += ways.authors_cases(layer, 20)
    return found + ways.peer_cases(layers[0][1], 20)[0]


def test_all_cases_are_right(operands):
    cases = all_cases()
    assert len({case.name for case in cases}) == len(cases) > 20
    operands.check(cases, gradients=True)


class Wrong(torch.nn.Linear):
    """A dense layer with a mistake in its output or in the gradient of its weight or input."""

    mistake = ""

    def forward(self, input):
        x = input
        if self.mistake == "weight":
            return super().forward(x) + 0.01 * (self.weight - self.weight.detach())[0, 0]
        if self.mistake == "input":
            return super().forward(x) + 0.1 * (x - x.detach())[:, :1]
        y = super().forward(x)
        if self.mistake == "one element":
            return y + 0.05 * torch.nn.functional.one_hot(torch.tensor(7 * 24 + 3), y.numel()).view(y.shape)
        return y[:, :-1] if self.mistake == "shape" else y


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        ("one element", "output is wrong"),
        ("weight", "gradient of weight is wrong"),
        ("input", "gradient of the input is wrong"),
        ("shape", r"output is \(20, 23\), not \(20, 24\)"),
        ("", ""),
    ],
)
def test_what_is_wrong_is_refused(operands, mistake, says):
    layer = Wrong(32, 24)
    layer.mistake = mistake
    case = ways.Case("odd", layer, layer, 1, 1, 2, layer)
    if not mistake:
        return operands.check([case], gradients=True)
    with pytest.raises(KronblocksError, match=f"odd: the {says}.*nothing was timed"):
        operands.check([case], gradients=True)


def test_wrong_cases_are_not_timed(operands, monkeypatch):
    layer = Wrong(32, 24)
    layer.mistake = "one element"
    monkeypatch.setattr(grids, "measure", lambda *args, **settings: pytest.fail("timed"))
    found = grids.Ways([ways.Case("odd", layer, layer, 1, 1, 2, layer)])
    with pytest.raises(KronblocksError, match="nothing was timed"):
        grids.time_group(GROUP, found, operands, OpsSettings(quick=True), None, train=False)


def test_masks_have_exactly_the_density():
    grid = BlockGrid(40, 40, BlockSize(4, 4))
    for density, live in ((0.05, 5), (0.1, 10), (1.0, 100), (0.001, 1)):
        assert int(ways.random_mask(grid, density, torch.Generator().manual_seed(0)).sum()) == live


def test_torchs_square_blocks_are_a_reason_and_no_error():
    cases, reasons = ways.peer_cases(ways.values_layer(GRID, MASK, "cpu"), 20)
    assert [case.name for case in cases] == ["SciPy BSR"]
    assert set(reasons) == {"torch BSR F.linear", "torch BSR W @ x.T"}
    assert all("square" in reason for reason in reasons.values())
