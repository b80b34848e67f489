"""What is made from weights that are there, or filled at once, draws no random numbers: a script's others stay the same."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers import mlp
from torch import Tensor, nn

import kronblocks
from kronblocks import BlockSparseLinear, KroneckerBlockLinear, SparsityConfig, sparsify_

X = torch.ones(2, 16)
MASK = torch.eye(4, dtype=torch.bool)


plain = functools.partial(mlp, 16, 16, 16)


def factored() -> nn.Sequential:
    return nn.Sequential(KroneckerBlockLinear(16, 16, 4, 2, gate=True), nn.ReLU(), KroneckerBlockLinear(16, 16, 4, 2))


def narrower() -> nn.Sequential:
    """With a block row that nobody needs."""
    model = factored()
    model[2].set_block_mask_(MASK.roll(1, 0) & (torch.arange(4) > 0))
    return model


def nothing_drawn(make: Callable[[], Any], use: Callable[[Any], object]) -> Any:
    made = make()
    before = torch.get_rng_state()
    result = use(made)
    assert torch.equal(torch.get_rng_state(), before)
    return result


CASES: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "from_dense": (plain, lambda model: BlockSparseLinear.from_dense(model[0], block_size=4, mask=MASK)),
    "from_kron": (factored, lambda model: BlockSparseLinear.from_kron(model[0])),
    "from_linear": (plain, lambda model: KroneckerBlockLinear.from_linear(model[0], block_size=4, rank=2)),
    "lift_": (factored, kronblocks.lift_),
    "densify_": (factored, kronblocks.densify_),
    "sparsify_, nearest": (plain, lambda model: sparsify_(model, SparsityConfig("rigl", 4, target_sparsity=0.5, init="nearest"))),
    "apply_structure_": (plain, lambda model: kronblocks.surgery.apply_structure_(model, kronblocks.surgery.structure(FACTORED))),
    "rebuild_on_load_": (plain, lambda model: kronblocks.rebuild_on_load_(model).load_state_dict(FACTORED.state_dict())),
}
FACTORED = factored()


@pytest.mark.parametrize("name", CASES)
def test_no_random_numbers_are_drawn(name):
    nothing_drawn(*CASES[name])


@pytest.mark.parametrize("form", ["auto", "dense", "packed", "factored", "bsr"])
@pytest.mark.parametrize("make", [factored, narrower])
def test_export_draws_none(make, form):
    exported = nothing_drawn(make, lambda model: kronblocks.export(model, X, form=form))
    assert exported.error < 1e-5


def test_loading_draws_none(tmp_path: Path):
    folder = kronblocks.save_pretrained(FACTORED, tmp_path / "model")
    nothing_drawn(plain, lambda model: kronblocks.from_pretrained(folder, model))
    model = plain()
    sparsifier = sparsify_(model, SparsityConfig(block_size=4, target_sparsity=0.5))
    kronblocks.surgery.lift_(model)
    state = sparsifier.state_dict()
    again = sparsify_(plain(), SparsityConfig(block_size=4, target_sparsity=0.5))
    nothing_drawn(lambda: again, lambda resumed: resumed.load_state_dict(state))
    assert all(isinstance(target.module, BlockSparseLinear) for target in again.targets)


def test_what_is_made_has_the_weights_mask_and_plan_that_it_should():
    layer = nn.Linear(16, 16)
    new = BlockSparseLinear.from_dense(layer, block_size=4, mask=MASK)
    expected: Tensor = layer.weight * MASK.repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert torch.equal(new.dense_weight(), expected) and torch.equal(new.bias, layer.bias) and torch.equal(new.block_mask, MASK)
    assert new.active_plan == BlockSparseLinear(16, 16, 4, mask=MASK).active_plan
    near = KroneckerBlockLinear.from_linear(layer, block_size=4, rank=16)
    assert near.active_plan == KroneckerBlockLinear(16, 16, 4, 16).active_plan
