"""Which layers are chosen, which not, and the reason given."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kronblocks import KronblocksError, LayerOverride, SparsityConfig
from kronblocks.surgery import select


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.fc2(self.fc1(x).relu())


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.blocks = nn.Sequential(Block(), Block())
        self.odd = nn.Linear(16, 10)
        self.prime = nn.Linear(16, 7)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight
        self.attention = nn.MultiheadAttention(16, 2)


def names(report) -> list[str]:
    return [each.name for each in report.selected]


def reasons(report) -> dict[str, str]:
    return {each.name: each.reason for each in report.left_dense}


def test_every_layer_is_selected_or_left_dense_with_a_reason():
    report = select(Model(), SparsityConfig(block_size=4))
    assert names(report) == ["blocks.0.fc1", "blocks.0.fc2", "blocks.1.fc1", "blocks.1.fc2"]
    why = reasons(report)
    assert set(why) == {"odd", "prime", "head", "embed", "attention.out_proj", "attention.in_proj"}
    assert "tied to embed.weight" in why["head"]
    assert "on_mismatch='nearest' would take 2x4" in why["odd"]
    assert "one fused function" in why["attention.out_proj"] and why["attention.in_proj"] == why["attention.out_proj"]
    assert all(name in str(report) for name in [*why, *names(report)])


def test_nearest_takes_the_largest_size_that_divides_both():
    report = select(Model(), SparsityConfig(block_size=4, on_mismatch="nearest"))
    sizes = {each.name: (str(each.grid.block), each.note) for each in report.selected}
    assert sizes["odd"] == ("2x4", "4x4 does not divide, 2x4 does")
    assert sizes["prime"][0] == "1x4"
    assert sizes["blocks.0.fc1"] == ("4x4", "")


@pytest.mark.parametrize(
    ("layers", "exclude", "expected"),
    [
        (("blocks.0.*",), (), ["blocks.0.fc1", "blocks.0.fc2"]),
        (("re:.*fc1",), (), ["blocks.0.fc1", "blocks.1.fc1"]),
        (("type:Block",), ("*.fc2",), ["blocks.0.fc1", "blocks.1.fc1"]),
        ((Block,), ("re:blocks\\.1\\..*",), ["blocks.0.fc1", "blocks.0.fc2"]),
        (("*",), ("type:Block", "prime"), ["odd"]),
    ],
)
def test_patterns(layers, exclude, expected):
    report = select(Model(), SparsityConfig(block_size=2, layers=layers, exclude=exclude))
    assert names(report) == expected


def test_overrides_apply_in_order_and_ranks_stop_at_the_area():
    config = SparsityConfig(
        block_size=4,
        rank=3,
        tile_groups=1,
        layers=("blocks.*",),
        overrides={
            "*.fc2": LayerOverride(block_size="2x8", rank=2),
            "blocks.1.fc2": LayerOverride(tile_groups="per-row"),
            "blocks.0.fc1": LayerOverride(block_size=1),
        },
    )
    found = {each.name: (str(each.grid.block), each.rank, each.tile_groups) for each in select(Model(), config).selected}
    assert found == {
        "blocks.0.fc1": ("1x1", 1, 1),
        "blocks.0.fc2": ("2x8", 2, 1),
        "blocks.1.fc1": ("4x4", 3, 1),
        "blocks.1.fc2": ("2x8", 2, 8),
    }


def test_tied_linears_are_left_dense_but_one_module_in_two_places_is_not():
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    twice = nn.Linear(8, 8)
    report = select(nn.Sequential(first, second, twice, twice), SparsityConfig(block_size=4, target_sparsity=0.5))
    assert names(report) == ["2"]
    assert "tied to 1.weight" in reasons(report)["0"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"layers": ("block.*",)}, r"layers pattern 'block.\*' matches no nn.Linear"),
        ({"exclude": ("haed",)}, "exclude pattern.*there are head"),
        ({"overrides": {"nothing": LayerOverride(rank=1)}}, "overrides pattern"),
        ({"layers": ("re:(",)}, "no regular expression"),
        ({"layers": ("prime",)}, "no layer was selected"),
    ],
)
def test_patterns_that_select_nothing_are_errors(settings, says):
    with pytest.raises(KronblocksError, match=says):
        select(Model(), SparsityConfig(block_size=4, **settings))


def test_models_that_cannot_be_changed_are_errors():
    with pytest.raises(KronblocksError, match=r"nn.Sequential"):
        select(nn.Linear(8, 8), SparsityConfig(block_size=4))
    with pytest.raises(KronblocksError, match="no nn.Linear"):
        select(nn.Sequential(nn.ReLU()), SparsityConfig(block_size=4))


def test_weights_that_are_not_finite_are_named():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.no_grad():
        model[1].weight[3, 4] = float("nan")
    with pytest.raises(KronblocksError, match=r"weight of 1 .*not finite"):
        select(model, SparsityConfig(block_size=4))


def test_lazy_layers_wait():
    report = select(nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(8)), SparsityConfig(block_size=4))
    assert "LazyLinear" in reasons(report)["1"]


@pytest.mark.parametrize(("block", "rank"), [(2, 2), (4, 4), (8, 8), (16, 8), ("2x4", 2)])
def test_the_rank_follows_the_block_size_where_none_is_set(block, rank):
    model = nn.Sequential(nn.Linear(64, 32))
    (selected,) = select(model, SparsityConfig(block_size=block)).selected
    assert selected.rank == rank
    (selected,) = select(model, SparsityConfig(block_size=block, rank=3)).selected
    assert selected.rank == 3


@pytest.mark.parametrize("method", ["magnitude", "group-lasso", "rigl", "two-phase"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.int8, torch.float8_e4m3fn])
def test_weights_that_are_no_real_floating_point_numbers_are_left_dense(method, dtype):
    other = nn.Linear(16, 16)
    other.weight = nn.Parameter(other.weight.detach().to(dtype), requires_grad=dtype == torch.complex64)
    report = select(nn.Sequential(other, nn.Linear(16, 16)), SparsityConfig(method, 4))
    assert names(report) == ["1"] and f"its weight is {dtype}" in reasons(report)["0"]
    with pytest.raises(KronblocksError, match=f"no layer was selected.*\n.*0: its weight is {dtype}"):
        select(nn.Sequential(other), SparsityConfig(method, 4))


def test_a_broken_expression_is_refused_in_a_model_without_linear_layers_too():
    with pytest.raises(KronblocksError, match="is no regular expression"):
        select(nn.Sequential(nn.Embedding(8, 8)), SparsityConfig(block_size=2, exclude=("re:(",)))
