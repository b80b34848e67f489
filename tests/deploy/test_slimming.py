"""Narrower layers compute the same; only what is constant or unread goes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kronblocks import BlockSparseLinear, KroneckerBlockLinear, from_pretrained, sparsify_
from kronblocks.config.sparsity import SparsityConfig
from kronblocks.deploy import export
from kronblocks.deploy.slimming import Slimmed, remove_dead_features_


def chain(*kinds, bias=True, act=nn.GELU) -> nn.Sequential:
    """Layers 12 -> 16 -> 24 -> 8 in float64, each of a kind, with functions in between."""
    torch.manual_seed(0)
    sizes = (12, 16, 24, 8)
    layers: list[nn.Module] = []
    for kind, n, m in zip(kinds, sizes, sizes[1:], strict=False):
        layers += [kind(n, m, bias), act(), nn.Dropout(0.1)]
    return nn.Sequential(*layers[:-2]).double().eval()


def dense(n, m, bias):
    return nn.Linear(n, m, bias=bias)


def packed(n, m, bias):
    return BlockSparseLinear(n, m, 4, bias=bias)


def per_row(n, m, bias):
    return KroneckerBlockLinear(n, m, 4, rank=2, tile_groups=m // 4, gate=True, bias=bias)


def shared(n, m, bias):
    return KroneckerBlockLinear(n, m, 4, rank=2, bias=bias)


def kill(layer: nn.Module, *, rows=(), cols=()) -> None:
    """Block rows and columns of 4 features."""
    if isinstance(layer, nn.Linear):
        with torch.no_grad():
            for row in rows:
                layer.weight[4 * row : 4 * row + 4] = 0
            for col in cols:
                layer.weight[:, 4 * col : 4 * col + 4] = 0
        return
    mask = layer.block_mask.clone()
    mask[list(rows)], mask[:, list(cols)] = False, False
    layer.set_block_mask_(mask)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("first", [dense, packed, per_row, shared])
@pytest.mark.parametrize("second", [dense, packed, per_row, shared])
def test_constant_and_unread_features_go_and_the_outputs_stay(first, second, bias):
    model = chain(first, second, dense, bias=bias)
    kill(model[0], rows=[0, 2])
    kill(model[3], cols=[1, 2], rows=[3])
    kill(model[6], cols=[5])
    x = torch.randn(5, 12, dtype=torch.float64)
    expected = model(x)
    slimmed, remark = remove_dead_features_(model, (x,), {})
    assert slimmed == [Slimmed("3", "6", 8, 16), Slimmed("0", "3", 12, 4)] and remark == ""
    assert [model[i].out_features for i in (0, 3, 6)] == [4, 16, 8]
    torch.testing.assert_close(model(x), expected)
    assert type(model[0]) is type(chain(first)[0]) and not model[0].training


def test_removal_goes_back_through_the_chain():
    """What only fed removed features is unread itself."""
    model = chain(dense, packed, packed)
    kill(model[6], cols=[0, 1, 2, 3])
    mask = torch.zeros(6, 4, dtype=torch.bool)
    mask[:4, :3], mask[4:, 3] = True, True  # the last two block rows read the last block column only
    model[3].set_block_mask_(mask)
    x = torch.randn(5, 12, dtype=torch.float64)
    expected = model(x)
    slimmed, _ = remove_dead_features_(model, (x,), {})
    assert {(each.producer, each.removed, each.left) for each in slimmed} == {("3", 16, 8), ("0", 12, 4)}
    torch.testing.assert_close(model(x), expected)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        y = self.a(x)
        return self.c(y + self.b(y.relu())).softmax(-1)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.b(self.a(x)) if x.sum() > 0 else x


def test_what_others_read_or_what_is_read_twice_stays():
    model = Residual().eval()
    kill(model.a, rows=[0])
    kill(model.b, cols=[0], rows=[1])
    assert remove_dead_features_(model, (torch.randn(2, 8),), {}) == ([], "")
    again = nn.Sequential(*[nn.Linear(8, 8)] * 2).eval()  # one layer in two places
    kill(again[0], rows=[0])
    assert remove_dead_features_(again, (torch.randn(2, 8),), {}) == ([], "")
    groups = nn.Sequential(KroneckerBlockLinear(8, 16, 4, rank=1, tile_groups=2), nn.Linear(16, 2)).eval()
    kill(groups[0], rows=[0])
    assert remove_dead_features_(groups, (torch.randn(2, 8),), {}) == ([], "")


def test_blocks_of_other_sizes_go_where_both_agree():
    model = nn.Sequential(BlockSparseLinear(8, 24, 4), nn.ReLU(), BlockSparseLinear(24, 6, 6)).double().eval()
    mask = model[0].block_mask.clone()
    mask[:3] = False  # 12 features: two block columns of 6
    mask[4] = False  # and 4 in the midst of others
    model[0].set_block_mask_(mask)
    x = torch.randn(3, 8, dtype=torch.float64)
    expected = model(x)
    assert remove_dead_features_(model, (x,), {})[0] == [Slimmed("0", "2", 12, 12)]
    torch.testing.assert_close(model(x), expected)


def test_a_layer_keeps_something_and_models_that_cannot_be_traced_stay():
    model = chain(packed, packed)
    kill(model[0], rows=[0, 1, 2, 3])
    x = torch.randn(3, 12, dtype=torch.float64)
    expected = model(x)
    assert remove_dead_features_(model, (x,), {})[0] == [Slimmed("0", "3", 12, 4)]
    torch.testing.assert_close(model(x), expected)
    slimmed, remark = remove_dead_features_(Branching().eval(), (torch.randn(2, 8),), {})
    assert slimmed == [] and "cannot be traced" in remark


def test_an_exported_model_is_narrower_and_comes_back_from_its_folder(tmp_path):
    model = chain(packed, per_row, dense)
    kill(model[0], rows=[0, 2])
    kill(model[3], cols=[1])
    x = torch.randn(5, 12, dtype=torch.float64)
    exported = export(model, x, form="packed", tolerance=1e-12)
    assert "0 -> 3: 12 dead features removed, 4 left" in str(exported)
    assert exported.manifest()["slimmed"][0]["removed"] == 12 and model[0].out_features == 16
    again = from_pretrained(exported.save(tmp_path), chain(dense, dense, dense))
    torch.testing.assert_close(again(x), model(x))
    assert [again[i].out_features for i in (0, 3)] == [4, 24]
    torch.testing.assert_close(export(model, x, form="packed", slim=False).model(x), model(x))


def test_a_transformers_model_is_traced(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3)
    model = transformers.ViTForImageClassification(config).eval()
    sparsify_(model, SparsityConfig(block_size=8, target_sparsity=0.5, exclude=("classifier",)))
    wide = [name for name, each in model.named_modules() if isinstance(each, KroneckerBlockLinear) and each.out_features == 64]
    first = wide[0]
    kill(model.get_submodule(first), rows=[1, 5])
    x = torch.randn(2, 3, 8, 8)
    exported = export(model, {"pixel_values": x}, form="packed")
    assert [(each.producer, each.removed, each.left) for each in exported.slimmed] == [(first, 16, 48)]
    torch.testing.assert_close(exported.model(x).logits, model(x).logits, rtol=1e-4, atol=1e-5)
    again = from_pretrained(exported.save(tmp_path))  # built from config.json alone
    torch.testing.assert_close(again(x).logits, exported.model(x).logits)
