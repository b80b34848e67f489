"""A plain model builds the layers that the weights are of, whoever calls load_state_dict."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from kronblocks import BlockSparseLinear, KronblocksError, KroneckerBlockLinear, SparsityConfig, rebuild_on_load_, sparsify_
from kronblocks.surgery import lift_


class Net(nn.Module):
    """A tied layer, a convolution, and a layer that stays dense."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.up, self.down = nn.Conv2d(4, 8, 3, padding=1), nn.Linear(8, 16), nn.Linear(16, 8)
        self.again, self.head = self.up, nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.again(self.down(self.up(self.conv(x).mean((2, 3))))))


def config(**settings) -> SparsityConfig:
    shared = {"block_size": 4, "target_sparsity": 0.5, "convolutions": True, "exclude": ("head",), "measure_plans": False}
    return SparsityConfig(**{**shared, **settings})


def trained(**settings) -> Net:
    model = Net()
    sparsifier = sparsify_(model, config(**settings))
    for target in sparsifier.targets:
        target.module.set_block_mask_(target.mask & (torch.rand(target.grid.shape) < 0.8))
    return model.eval()


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))  # noqa: S301


X = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(1))
KINDS = [{"method": "rigl"}, {"method": "two-phase", "rank": 2}, {"method": "kron-l1", "rank": 1, "tile_groups": "per-row"}]


@pytest.mark.parametrize("settings", KINDS, ids=lambda settings: settings["method"])
@pytest.mark.parametrize("changed", [copy.deepcopy, pickled, lambda model: model])
@pytest.mark.parametrize("assign", [False, True])
def test_block_sparse_weights_are_loaded_into_the_models_own_class(settings, changed, assign):
    model = trained(**settings)
    fresh = changed(rebuild_on_load_(Net()).eval())
    state = copy.deepcopy(model.state_dict())
    found = fresh.load_state_dict(state, assign=assign)
    assert not found.missing_keys and not found.unexpected_keys and state.keys() == model.state_dict().keys()
    assert fresh.again is fresh.up and type(fresh.up) is type(model.up) and torch.allclose(fresh(X), model(X), atol=1e-6)
    assert torch.equal(fresh.up.block_mask, model.up.block_mask) and fresh.conv.linear.grid == model.conv.linear.grid
    fresh.load_state_dict(model.state_dict())  # into what is there now


def test_a_part_of_a_model_and_weights_under_a_prefix():
    model = nn.ModuleDict({"body": trained(method="rigl")})
    fresh = nn.ModuleDict({"body": rebuild_on_load_(Net()).eval()})
    fresh.load_state_dict(model.state_dict())
    assert torch.allclose(fresh["body"](X), model["body"](X), atol=1e-6)


def test_plain_weights_and_what_a_trainer_carries():
    plain, fresh = Net().eval(), rebuild_on_load_(Net()).eval()
    fresh.load_state_dict(plain.state_dict())
    assert isinstance(fresh.up, nn.Linear) and torch.equal(fresh(X), plain(X))
    model = Net()
    sparsify_(model, config(method="rigl")).save_with_model()
    fresh.load_state_dict(model.state_dict())
    assert torch.allclose(fresh(X), model.eval()(X), atol=1e-6)


def test_a_sparsifier_that_is_carried_restores_its_own_model():
    """The hook of a model's code leaves it what it knows better: the structure, and the optimisers."""
    model = rebuild_on_load_(nn.Sequential(nn.Linear(8, 8)))
    sparsifier = sparsify_(model, SparsityConfig(block_size=4, rank=1, target_sparsity=0.5, measure_plans=False))
    sparsifier.save_with_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer, total_steps=20)
    before = copy.deepcopy(model.state_dict())
    for _ in range(10):
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert isinstance(model[0], BlockSparseLinear)
    model.load_state_dict(before)
    assert isinstance(model[0], KroneckerBlockLinear) and sparsifier.step == 0
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}


def test_other_block_layers_and_other_sizes_are_refused():
    model = trained(method="rigl")
    factored = rebuild_on_load_(trained(method="two-phase", rank=2))
    with pytest.raises(KronblocksError, match=r"of a BlockSparseLinear with other sizes than the model's KroneckerBlockLinear"):
        factored.load_state_dict(model.state_dict())
    wider = rebuild_on_load_(nn.ModuleDict({"up": nn.Linear(8, 32)}))
    with pytest.raises(KronblocksError, match="has other sizes than the model's"):
        wider.load_state_dict({f"up.{name}": each for name, each in model.up.state_dict().items()}, strict=False)
    other = rebuild_on_load_(nn.ModuleDict({"head": nn.Linear(16, 3)}))
    other.load_state_dict(model.state_dict(), strict=False)  # what the model has no place for is left out, as torch does
    assert torch.equal(other["head"].weight, model.head.weight)
    with pytest.raises(KronblocksError, match="needs a model"):
        rebuild_on_load_(model.state_dict())


def test_on_the_meta_device_and_after_a_lift_by_hand():
    model = trained(method="two-phase", rank=2)
    lift_(model)
    with torch.device("meta"):
        fresh = rebuild_on_load_(Net())
    fresh.load_state_dict(model.state_dict(), assign=True)
    assert torch.allclose(fresh.eval()(X), model(X), atol=1e-6)
