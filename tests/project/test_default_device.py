"""A default device that is not the model's: every tensor that the library makes names its own."""

from __future__ import annotations

import pytest
import torch
from tests.helpers import METHODS, same
from tests.search.small_task import CONFIG
from torch import nn

from kronblocks import (
    Distillation,
    SearchTask,
    SparsityConfig,
    densify_,
    export,
    find_block_size,
    from_pretrained,
    parameter_groups,
    save_pretrained,
    sparsify_,
)
from kronblocks.config import RankChoice
from kronblocks.search import SearchConfig
from kronblocks.surgery import apply_structure_, structure

STEPS = 20
SETTINGS = [
    *({"method": method} for method in METHODS),
    {"method": "magnitude", "storage": "packed", "score": "taylor", "regrow": 0.2, "scope": "layer"},
    {"method": "rigl", "storage": "dense", "init": "nearest", "distribution": "uniform"},
    {"method": "two-phase", "init": "nearest", "rank": RankChoice(max_error=0.5), "gate": True},
]


def make() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(32, 48, device="cpu"), nn.Tanh(), nn.Linear(48, 32, device="cpu"), nn.Tanh(), nn.Linear(32, 18, device="cpu")
    )


def whole_life(settings: dict, folder) -> dict:
    """What a model is after a training, and after being saved, loaded and exported."""
    model, config = make(), SparsityConfig(block_size="6x8", target_sparsity=0.7, on_mismatch="nearest", **settings)
    distillation = Distillation.of(make())
    sparsifier = sparsify_(model, config)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2))
    sparsifier.attach(optimizer, total_steps=STEPS)
    sparsifier.save_with_model()
    for step in range(STEPS):
        x = torch.randn(16, 32, device="cpu", generator=torch.Generator().manual_seed(step))
        output = model(x)
        loss = distillation((output - x[:, :18]).square().mean(), output, x) + sparsifier.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.load_state_dict(model.state_dict())
    again = from_pretrained(save_pretrained(model, folder, sparsifier=sparsifier), make)
    x = torch.ones(2, 32, device="cpu")
    found = {"report": sparsifier.report().to_dict(), "model": model.state_dict(), "loaded": again.state_dict()}
    found["output"] = export(model, x, sparsifier=sparsifier, form="packed").model(x)
    further = sparsify_(again, SparsityConfig(settings["method"], "6x8", target_sparsity=0.8))
    rebuilt = make()
    apply_structure_(rebuilt, structure(again))
    rebuilt.load_state_dict(again.state_dict())
    densify_(rebuilt)
    return {**found, "further": further.report().to_dict(), "dense": rebuilt.state_dict()}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:pruning has ended")  # gates of a training this short say little of layers
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_default_device_changes_nothing(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("KRONBLOCKS_MEASURE", "0")
    wanted = whole_life(settings, tmp_path / "without")
    with torch.device("meta"):
        found = whole_life(settings, tmp_path / "with")
    assert same(found, wanted)


@pytest.mark.slow
def test_a_search_under_a_default_device():
    def batches(seed: int):
        generator = torch.Generator().manual_seed(seed)
        while True:
            x = torch.randn(16, 32, generator=generator, device="cpu")
            yield x, x[:, :8]

    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(32, 32, device="cpu"), nn.Tanh(), nn.Linear(32, 8, device="cpu"))

    def find():
        held = [next(batches(7))]
        task = SearchTask(batches, held, lambda net, batch: (net(batch[0]) - batch[1]).square().mean(1), lr=1e-2)
        return find_block_size(model(), CONFIG, task, total_steps=80, search=SearchConfig(sizes=(2, 4), rounds=1))

    wanted = find()
    with torch.device("meta"):
        found = find()
    assert [path.block for path in found.paths] == [path.block for path in wanted.paths]
