"""Networks with convolutions: LeNet-5 and a small ResNet become block-sparse, are saved, exported and given back as they were."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kronblocks import (
    KronblocksError,
    KronblocksWarning,
    LayerOverride,
    SparsityConfig,
    densify_,
    export,
    from_pretrained,
    parameter_groups,
    save_pretrained,
    sparsify_,
)
from kronblocks.algorithms.training.report import count_blocks
from kronblocks.nn.base import BlockLayer
from kronblocks.nn.unfolded import UnfoldedConv
from kronblocks.surgery import apply_structure_, structure

STEPS = 20


class Block(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.short = nn.Conv2d(channels, out, 1, stride=stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x):
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(y + self.short(x))


def resnet() -> nn.Module:
    torch.manual_seed(0)
    stem = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*stem, Block(8, 8, 1), Block(8, 16, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))


def lenet5() -> nn.Module:
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(
        *convolutions, nn.Flatten(), nn.Linear(16, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 4)
    )


def images(step: int, rows: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(rows, 1, 12, 12, generator=torch.Generator().manual_seed(step))
    return x, (x[:, 0, :6].mean((1, 2)) > 0).long() + 2 * (x[:, 0, 6:].mean((1, 2)) > 0).long()


def config(**settings) -> SparsityConfig:
    shared = {"block_size": 4, "target_sparsity": 0.5, "convolutions": True, "on_mismatch": "nearest", "measure_plans": False}
    return SparsityConfig(**{**shared, **settings})


def trained(model: nn.Module, chosen: SparsityConfig):
    sparsifier = sparsify_(model, chosen)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2))
    sparsifier.attach(optimizer, total_steps=STEPS)
    losses = []
    for step in range(STEPS):
        x, y = images(step % 5)
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        (loss + sparsifier.penalty()).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert count_blocks(sparsifier.targets).block_sparsity == pytest.approx(chosen.target_sparsity, abs=0.02)
    return sparsifier


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:rank 2 in blocks of 2x1")
@pytest.mark.parametrize("method", ["two-phase", "kron-l1", "group-lasso", "rigl", "magnitude", "static"])
@pytest.mark.parametrize("make", [resnet, lenet5])
def test_every_method_trains_them_to_the_target(make, method):
    model = make()
    sparsifier = trained(model, config(method=method))
    for target in sparsifier.targets:
        around = model.get_submodule(target.name.rpartition(".")[0])
        if isinstance(around, UnfoldedConv):  # no block cuts across kernel positions
            assert around.in_channels % target.grid.block.cols == 0


def test_saved_loaded_exported_and_given_back(tmp_path):
    model = resnet()
    trained(model, config())
    model.eval()
    x = images(99)[0]
    with torch.no_grad():
        expected = model(x)
        again = from_pretrained(save_pretrained(model, tmp_path / "saved"), resnet)
        assert torch.allclose(again(x), expected, atol=1e-6)
        fresh = resnet()
        apply_structure_(fresh, structure(model))
        fresh.load_state_dict(model.state_dict())
        assert torch.allclose(fresh.eval()(x), expected, atol=1e-6)
        for form in ("dense", "packed", "auto"):
            exported = export(model, x, form=form)
            assert exported.error < 1e-5
            if form == "dense":
                assert [type(m) for m in exported.model.modules()] == [type(m) for m in resnet().modules()]
            around = {n: m.convolution for n, m in exported.model.named_modules() if isinstance(m, BlockLayer)}
            if form == "packed":
                assert around["2.conv1.linear"].size == (12, 12) and around["3.conv1.linear"].size == (6, 6)
                assert around["6"] is None
        names = densify_(model)
        assert "2.conv1.linear" in names and isinstance(model[2].conv1, nn.Conv2d)
        assert resnet().state_dict().keys() == model.state_dict().keys()
        assert torch.allclose(model(x), expected, atol=1e-5)


def test_a_run_goes_on_over_the_lift():
    model = resnet()
    sparsifier = trained(model, config())
    fresh = resnet()
    other = sparsify_(fresh, config())
    other.load_state_dict(sparsifier.state_dict())
    fresh.load_state_dict(model.state_dict())
    x = images(3)[0]
    assert torch.equal(fresh.eval()(x), model.eval()(x))


def test_patterns_name_convolutions_as_the_model_does_and_the_rest_is_left_as_it_was():
    model = resnet()
    stem, short = model[0], model[3].short
    sparsifier = sparsify_(model, config(exclude=("3.short",), overrides={"2.conv1": LayerOverride(block_size=8)}))
    assert model[3].short is short and model[0] is not stem
    assert str(next(t for t in sparsifier.targets if t.name == "2.conv1.linear").grid.block) == "8x8"
    assert ("3.short", "excluded by '3.short'") in [(each.name, each.reason) for each in sparsifier.surgery.left_dense]
    plain = resnet()
    kept = plain[0]
    with pytest.warns(
        KronblocksWarning, match=r"only 1.3% of the model's weights .*3.conv2: 46%, 3.conv1: 23%, 2.conv1: 12%, ..."
    ):
        report = sparsify_(plain, config(convolutions=False)).surgery
    assert plain[0] is kept and "0: a convolution: convolutions=True" in str(report)


def test_an_error_leaves_the_model_as_it_was():
    model = resnet()
    before = dict(model.named_modules())
    with pytest.raises(KronblocksError, match="matches no"):
        sparsify_(model, config(exclude=("nothing",)))
    assert dict(model.named_modules()) == before
    with pytest.raises(KronblocksError, match="not a convolution"):
        apply_structure_(model, {"version": 1, "layers": {}, "unfolded": ["0", "1"]})
    assert dict(model.named_modules()) == before
    with pytest.raises(KronblocksError, match="no structure record"):
        apply_structure_(model, {"version": 1, "layers": {}, "unfolded": "0"})


@pytest.mark.parametrize("method", ["two-phase", "magnitude", "static"])
@pytest.mark.parametrize("last", [False, True])
def test_the_output_lies_in_memory_as_that_of_a_convolution(method, last):
    layout = torch.channels_last if last else torch.contiguous_format
    conv = nn.Conv2d(8, 16, 3, padding=1)
    model = nn.Sequential(conv, nn.ReLU())
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=layout)
    expected = conv(x).stride()
    sparsifier = sparsify_(model, SparsityConfig(method=method, block_size=4, convolutions=True, target_sparsity=0.5))
    sparsifier.attach(torch.optim.SGD(model.parameters(), lr=0.1), total_steps=4)  # who watches the rows sees patches
    assert model[0](x).stride() == expected
    assert model[0].weight.shape == conv.weight.shape


@pytest.mark.parametrize("conv", [nn.Conv1d(4, 8, 3), nn.Conv2d(4, 8, (2, 3))])
def test_the_weight_of_an_unfolded_convolution(conv):
    weight = conv.weight.detach().clone()
    model = nn.Sequential(conv)
    sparsify_(model, SparsityConfig(method="magnitude", block_size=4, convolutions=True, target_sparsity=0.5))
    assert torch.equal(model[0].weight, weight)
