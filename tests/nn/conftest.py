"""The layers that the tests in this folder share: 12x15 in 3x5 blocks, and what they should compute."""

import pytest
import torch
from torch import nn

from kronblocks import BlockSparseLinear, KroneckerBlockLinear
from kronblocks.nn.base import BlockLayer
from kronblocks.ops import reference

KINDS = {
    "kron": (KroneckerBlockLinear, {"rank": 2}),
    "kron-groups": (KroneckerBlockLinear, {"rank": 3, "tile_groups": 2}),
    "kron-gate": (KroneckerBlockLinear, {"rank": 2, "tile_groups": 4, "gate": True}),
    "free": (BlockSparseLinear, {}),
}
PLANS = {kind: ("dense", "packed") if kind == "free" else ("dense", "tile_first", "coeff_first", "packed") for kind in KINDS}


class Maker:
    """Makes layers of one kind with one plan."""

    def __init__(self, kind: str, plan: str) -> None:
        self.kind, self.plan, self.plans = kind, plan, PLANS[kind]
        self.cls, self.settings = KINDS[kind]
        self.live = torch.tensor([[1, 0, 1], [1, 1, 1], [0, 0, 0], [0, 1, 1]], dtype=torch.bool)

    @property
    def args(self) -> tuple:
        return 15, 12, "3x5"

    def __call__(self, **settings) -> BlockLayer:
        return self.cls(*self.args, **{"plan": self.plan, **self.settings, **settings})

    def pruned(self, **settings) -> BlockLayer:
        """With dead blocks, and a gate that is not all ones."""
        layer = self(**settings)
        if isinstance(layer, KroneckerBlockLinear) and layer.gate is not None:
            nn.init.uniform_(layer.gate, 0.5, 2)
        layer.set_block_mask_(self.live.to(layer.block_mask.device))
        return layer


MADE = [(kind, plan) for kind in KINDS for plan in PLANS[kind]]


@pytest.fixture(params=MADE, ids="-".join)
def make(request) -> Maker:
    return Maker(*request.param)


@pytest.fixture(params=[(kind, plan) for kind, plan in MADE if kind != "free"], ids="-".join)
def make_factors(request) -> Maker:
    return Maker(*request.param)


@pytest.fixture(params=KINDS)
def make_any(request) -> Maker:
    """For what cannot depend on the plan."""
    return Maker(request.param, "auto")


def expected_weight(layer: BlockLayer) -> torch.Tensor:
    """W from the layer's parameters, by the formulas."""
    if isinstance(layer, KroneckerBlockLinear):
        coeff = layer.coeff if layer.gate is None else layer.coeff * layer.gate[..., None]
        return reference.kron_weight(coeff * layer.block_mask[..., None], layer.tiles)
    assert isinstance(layer, BlockSparseLinear)
    places = [divmod(int(block), layer.grid.shape[1]) for block in layer.block_position]
    live = [k for k, place in enumerate(places) if layer.block_mask[place]]
    return reference.packed_weight(layer.values[live], [places[k] for k in live], layer.grid.shape)


@pytest.fixture(scope="session", name="expected_weight")
def expected_weight_fixture():
    return expected_weight


@pytest.fixture
def compiles_afresh():
    torch.compiler.reset()
