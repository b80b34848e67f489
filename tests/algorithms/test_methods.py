"""What each method does to the blocks over a training."""

from __future__ import annotations

import math

import pytest
import torch
from tests.helpers import STEPS, Training

from kronblocks import ScheduleConfig, SparsityConfig, parameter_groups


def test_static_keeps_its_random_blocks():
    training = Training(SparsityConfig(method="static", block_size=4, target_sparsity=0.5))
    masks = [target.mask.clone() for target in training.sparsifier.targets]
    assert training.sparsifier.sparsity == 0.5
    training.start().run(STEPS)
    assert all(torch.equal(a, t.mask) for a, t in zip(masks, training.sparsifier.targets, strict=True))


@pytest.mark.parametrize("storage", ["packed", "dense"])
def test_rigl_moves_its_blocks_at_constant_sparsity(storage):
    schedule = ScheduleConfig(update_every=4)
    config = SparsityConfig(method="rigl", block_size=4, target_sparsity=0.75, storage=storage, schedule=schedule)
    training = Training(config).start()
    kind = {"packed": "BlockSparseLinear", "dense": "Linear"}[storage]
    assert all(type(target.module).__name__ == kind for target in training.sparsifier.targets)
    masks = [[target.mask.clone() for target in training.sparsifier.targets]]
    for step in range(1, STEPS + 1):
        training.run(step)
        masks.append([target.mask.clone() for target in training.sparsifier.targets])
        assert sum(int((~mask).sum()) for mask in masks[-1]) == 0.75 * sum(mask.numel() for mask in masks[-1])
    moved = [step for step in range(1, STEPS + 1) if not all(map(torch.equal, masks[step], masks[step - 1]))]
    assert moved and all(training.sparsifier.schedule.is_update(step) for step in moved)
    assert [[int(mask.sum()) for mask in each] for each in (masks[0], masks[-1])] == [[int(m.sum()) for m in masks[0]]] * 2
    assert training.sparsifier.sparsity == 0.75


def test_rigl_stored_either_way_is_the_same_training():
    weights = []
    for storage in ("packed", "dense"):
        config = SparsityConfig(method="rigl", block_size=4, target_sparsity=0.75, storage=storage)
        training = Training(config)
        groups = parameter_groups(training.model, lr=1e-2, lifted_lr_scale=1.0)
        training.make_optimizer = lambda _, groups=groups: torch.optim.AdamW(groups)
        training.start().run(STEPS)
        weights.append([target.module.weight.detach() for target in training.sparsifier.targets])
    # 1e-4: fp32 sums in another order, over 40 steps of Adam
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*weights, strict=True))


def test_iterative_prunes_the_same_share_in_each_stage():
    config = SparsityConfig(method="iterative", block_size=2, target_sparsity=1 - 0.5**5)
    training = Training(config).start()
    sparsities = []
    for step in range(1, STEPS + 1):
        sparsities.append(training.run(step).sparsifier.sparsity)
    stages = sorted(set(sparsities))
    # half of what lives at each of the five stages, rounded up to whole blocks
    total = training.sparsifier.report().total_blocks
    assert stages == [math.ceil(total * (1 - 0.5**k) - 1e-9) / total for k in range(6)]


@pytest.mark.parametrize("settings", [{"regrow": 0.3}, {"score": "taylor"}, {"gate": True}, {"gate": True, "score": "gate"}])
def test_variants_of_two_phase_hit_the_target(settings):
    training = Training(SparsityConfig(block_size=4, rank=2, target_sparsity=0.75, **settings)).start().run(STEPS)
    assert training.sparsifier.sparsity == 0.75
    assert type(training.model[0]).__name__ == "BlockSparseLinear"
