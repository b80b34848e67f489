"""Counted costs against independent counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kronblocks import KroneckerBlockLinear, SparsityConfig, sparsify_
from kronblocks.surgery import lift_
from kronblocks_lab.training import accounting
from kronblocks_lab.training.models import build_model

pytestmark = pytest.mark.slow


def counted(model: nn.Module, x: torch.Tensor) -> tuple[int, int]:
    """Multiply-adds of forward, and of forward and backward, by torch's own counter (2 operations each)."""
    with FlopCounterMode(display=False) as forward:
        y = model(x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    return forward.get_total_flops() // 2, (forward.get_total_flops() + backward.get_total_flops()) // 2


@pytest.mark.parametrize("name", ["linear", "mlp", "lenet5"])
def test_dense_models_are_counted_like_torch_does(name):
    model = build_model(name, (1, 28, 28), 10, (64, 32))
    counter = accounting.MacCounter(model, torch.randn(2, 1, 28, 28))
    assert (counter.inference_macs(5), counter.training_macs(5)) == counted(model, torch.randn(5, 1, 28, 28))


@pytest.mark.parametrize(("name", "attention"), [("vit-tiny", 12 * 2 * 65 * 65 * 192), ("swin-tiny", 3_961_344)])
def test_the_products_of_attention_count(name, attention):
    model = build_model(name, (1, 28, 28), 10, (), 32).eval()
    dense = accounting.MacCounter(model, torch.randn(2, 1, 28, 28))
    with sdpa_kernel(SDPBackend.MATH):  # torch's counter knows no fused attention of a CPU
        assert (dense.inference_macs(3), dense.training_macs(3)) == counted(model, torch.randn(3, 1, 28, 28))
    sparsify_(model, SparsityConfig(target_sparsity=0.9, block_size=4, on_mismatch="nearest", measure_plans=False))
    sparse = accounting.MacCounter(model, torch.randn(2, 1, 28, 28))
    layers = {name: 0.0 for name, module in model.named_modules() if isinstance(module, KroneckerBlockLinear)}
    patches = sparse.inference_macs(1, layers) - attention  # what is left without a live block: the convolution
    assert 0 < patches == 64 * 16 * {"vit-tiny": 192, "swin-tiny": 96}[name]


@pytest.mark.parametrize("plan", ["dense", "tile_first", "coeff_first"])
def test_factored_models_are_counted_like_torch_does(plan):
    model = build_model("mlp", (1, 8, 8), 12, (32, 16))
    sparsify_(model, SparsityConfig(block_size=4, rank=2, target_sparsity=0.5, tile_groups=1))
    counter = accounting.MacCounter(model, torch.randn(2, 1, 8, 8))
    for layer in (model[1], model[3], model[5]):
        layer.use_plan_(plan)
    assert (counter.inference_macs(7), counter.training_macs(7)) == counted(model, torch.randn(7, 1, 8, 8))


def test_packed_layers_are_charged_for_live_blocks_only():
    model = build_model("mlp", (1, 8, 8), 12, (32,))
    sparsify_(model, SparsityConfig(block_size=4, rank=2, target_sparsity=0.5))
    model[1].set_block_mask_(torch.eye(8, 16, dtype=torch.bool))
    lift_(model)
    counter = accounting.MacCounter(model, torch.randn(2, 1, 8, 8))
    model[1].use_plan_("packed")
    model[3].use_plan_("packed")
    # 8 live blocks of 16 in the first layer, whose input needs no gradient; 24 in the last
    assert counter.training_macs(3) == 3 * 16 * (8 * 2 + 24 * 3)


def test_growth_scores_are_charged_as_dense_weight_gradients():
    model = build_model("mlp", (1, 8, 8), 12, (32, 16))
    sparsifier = sparsify_(model, SparsityConfig(method="rigl", block_size=4, target_sparsity=0.5))
    counter = accounting.MacCounter(model, torch.randn(2, 1, 8, 8))
    x = torch.randn(7, 1, 8, 8)
    plain = counted(model, x)[1]
    for target in sparsifier.targets:
        target.start_probe()
    weights = {target.name: target.grid.weights for target in sparsifier.targets}
    assert counter.growth_macs(7, weights) == counted(model, x)[1] - plain == 7 * (64 * 32 + 32 * 16 + 16 * 12)


def test_bytes_of_a_training_are_those_of_its_tensors():
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2, bias=False))
    model[1].weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(torch.randn(3, 6)).sum().backward()
    optimizer.step()
    # 28 trained and 8 frozen values; AdamW: two moments a value, and a step count for each of two tensors
    assert accounting.training_bytes(model, optimizer) == {
        "parameters": 36 * 4,
        "gradients": 28 * 4,
        "optimizer_state": 28 * 8 + 2 * 4,
    }
    assert accounting.trainable_parameters(model) == 28


def test_saved_tensors_are_counted_once_and_parameters_not():
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(3, 6, requires_grad=True)
    with accounting.saved_tensor_bytes(model) as saved:
        model(x).sum()
    # x, and the output of the ReLU (saved by itself and by the next layer)
    assert saved["saved_tensors"] == (3 * 6 + 3 * 4) * 4


def test_peak_memory_sees_an_array_that_came_and_went():
    peak = accounting.PeakMemory()
    before = peak.bytes()
    array = np.ones(8 * 2**20)  # 64 MiB
    del array
    if peak.exact:
        assert 60 * 2**20 < peak.bytes() - before < 80 * 2**20
    else:
        assert peak.bytes() >= before
