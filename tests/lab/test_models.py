"""The models of the experiments have the sizes that they are known by."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kronblocks import KronblocksError, KroneckerBlockLinear, SparsityConfig, sparsify_
from kronblocks_lab.training.models import build_model
from kronblocks_lab.training.settings import TrainConfig


# the paper's: ViT-tiny and Swin-tiny as it counts them, ViT-base with 100 classes from the published size
@pytest.mark.parametrize(("name", "number"), [("vit-tiny", 5_543_716), ("swin-tiny", 27_596_254), ("vit-base", 85_875_556)])
def test_transformers_have_the_papers_numbers_of_parameters(name, number):
    with torch.device("meta"):
        model = build_model(name, (3, 32, 32), 100)
    assert sum(p.numel() for p in model.parameters()) == number


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit-tiny", "swin-tiny"])
def test_transformers_scale_images_and_train_block_sparse(name):
    torch.manual_seed(0)
    model = build_model(name, (1, 28, 28), 10, image_size=32)
    sparsifier = sparsify_(model, SparsityConfig(block_size=16, rank=2, target_sparsity=0.8, on_mismatch="nearest"))
    assert not [module for module in model.modules() if type(module) is nn.Linear]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sparsifier.attach(optimizer, total_steps=4)
    for _ in range(4):
        loss = model(torch.randn(2, 1, 28, 28)).logsumexp(1).sum() + sparsifier.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert 0.8 <= sparsifier.sparsity < 0.81
    assert model(torch.randn(3, 1, 28, 28)).shape == (3, 10)


@pytest.mark.parametrize(("name", "size", "says"), [("vit-tiny", 30, "multiple of 4"), ("vit-base", 132, "multiple of 16")])
def test_image_sizes_that_do_not_fit(name, size, says):
    with pytest.raises(KronblocksError, match=says):
        build_model(name, (3, 32, 32), 10, image_size=size)


def test_unknown_names_are_told_the_known_ones():
    with pytest.raises(KronblocksError, match="lenet5, vit-tiny"):
        build_model("resnet", (3, 32, 32), 10)  # type: ignore[arg-type]


def test_plans_of_transformers_are_chosen_for_batch_times_tokens(tmp_path):
    config = TrainConfig(out=tmp_path, model="vit-tiny", image_size=32, batch_size=2, measure_plans=False)
    model = build_model(config.model, (1, 28, 28), 10, image_size=config.image_size)
    sparsifier = sparsify_(model, config.sparsity_config())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    sparsifier.attach(optimizer, total_steps=40)
    model(torch.randn(config.batch_size, 1, 28, 28)).logsumexp(1).sum().backward()
    optimizer.step()
    rows = {name: layer.rows for name, layer in model.named_modules() if isinstance(layer, KroneckerBlockLinear)}
    assert rows.pop("model.classifier") == 2
    assert set(rows.values()) == {2 * (1 + 8 * 8)}, "a class token, and patches of 4 pixels"
