"""Tables of models with many layers: those that are alike share a row, and every one has its own on request."""

import dataclasses
import re

import pytest
from torch import nn

from kronblocks.algorithms.training.report import LayerSparsity, SparsityReport
from kronblocks.config.sparsity import SparsityConfig
from kronblocks.core.tables import ALL_ROWS, between, listed, span, text_table, together
from kronblocks.deploy.exported import Exported, ExportedLayer
from kronblocks.deploy.slimming import Slimmed
from kronblocks.surgery.selection import select
from kronblocks_lab.commands.train import _left_dense, _sizes

ATTENTION = [f"layers.{i}.attention.{each}_proj" for i in range(12) for each in "qkvo"]
MLP = [f"layers.{i}.mlp.fc{each}" for i in range(12) for each in (1, 2)]


def test_cells_stand_below_each_other_and_no_line_ends_in_spaces():
    assert text_table([("a", "b"), ("long", ""), ("", "c")]) == "a     b\nlong\n      c"


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["fc"], "fc"),
        (ATTENTION, "layers.0-11.attention.{q,k,v,o}_proj (48 layers)"),
        (["a.0.b", "a.2.b", "a.3.b"], "a.0,2-3.b (3 layers)"),
        ([f"a.{2 * i}" for i in range(9)], "a.0,2,4,...,16 (9 layers)"),
        (["a.query", "a.key"], "a.{query,key} (2 layers)"),
        (["x.in_proj_a", "x.in_b"], "x.in_{proj_a,b} (2 layers)"),
        (["x.a_a", "x.a_b_a"], "x.{a_a,a_b_a} (2 layers)"),
        (["a.0.b.1", "a.1.b.0"], "a.0.b.1, a.1.b.0 (2 layers)"),
    ],
)
def test_the_name_of_a_group(names, said):
    assert span(names) == said


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        (ATTENTION + MLP, ["layers.0-11.attention.{q,k,v,o}_proj (48 layers)", "layers.0-11.mlp.{fc1,fc2} (24 layers)"]),
        (["0.q", "1.q", "0.k"], ["0-1.q (2 layers)", "0.k"]),  # there is no 1.k
        (["a.q", "a.k", "b.q", "b.k"], ["a.{q,k} (2 layers)", "b.{q,k} (2 layers)"]),  # a second place would be too much
        (["a.q", "b.k"], ["a.q", "b.k"]),
        (["q", "a.q", "a.b.q"], ["q", "a.q", "a.b.q"]),
    ],
)
def test_which_layers_are_put_together(names, groups):
    found = together(names, str, lambda name: 0)
    assert sorted(name for group in found for name in group) == sorted(names)
    assert list(map(span, found)) == groups


def test_what_differs_is_not_put_together():
    assert together(ATTENTION, str, lambda name: "q" in name)[0] == [name for name in ATTENTION if "q" in name]


def test_texts_that_differ_in_figures():
    assert between(["at 65 rows 9.5 ms, dense 1.2e-05 s", "at 65 rows 10.5 ms, dense 3e-05 s"]) == (
        "at 65 rows 9.5 to 10.5 ms, dense 1.2e-05 to 3e-05 s"
    )
    assert between(["asked for"]) == "asked for"


def report(names):
    layers = [LayerSparsity(name, "Linear", 64, 64, "8x8", 10 + i, 100, "packed") for i, name in enumerate(names)]
    return SparsityReport(tuple(layers), 0.8)


def test_a_report_of_many_layers_has_a_row_for_those_that_are_alike():
    many = report(ATTENTION)
    lines = str(many).splitlines()
    assert re.split(" {2,}", lines[1]) == [
        *("layers.0-11.attention.{q,k,v,o}_proj (48 layers)", "Linear", "64x64", "8x8"),
        *("1608 / 4800", "0.6650, most 0.9000", "packed"),
    ]
    assert lines[-1] == ALL_ROWS and "far below the mean density: " not in lines
    every = many.table(every_layer=True)
    assert all(f"\n{name} " in every for name in ATTENTION) and ALL_ROWS not in every


def test_plans_that_differ_are_counted():
    layers = report(ATTENTION).layers
    mixed = SparsityReport((dataclasses.replace(layers[0], plan="dense"), *layers[1:]), 0.8)
    assert str(mixed).splitlines()[1].endswith("  dense (1), packed (47)")


def test_a_report_of_twelve_layers_has_a_row_for_each():
    few = report(ATTENTION[:12])
    assert str(few) == few.table(every_layer=True) and all(f"\n{name} " in str(few) for name in ATTENTION[:12])


def test_an_export_of_many_layers():
    why = "at 65 rows {} ms, dense 1.39 ms"
    layers = [
        ExportedLayer(name, "packed", 64, 64, "8x8", 0.1 + i / 100, 65, 1024, why.format(f"0.{3 + i % 2}"))
        for i, name in enumerate(MLP)
    ]
    layers[-1] = dataclasses.replace(layers[-1], form="dense", why="at 65 rows 0.30 ms")
    slimmed = [Slimmed(f"layers.{i}.mlp.fc1", f"layers.{i}.mlp.fc2", i + 1, 63 - i) for i in range(12)]
    exported = Exported(nn.Linear(2, 2), tuple(layers), tuple(slimmed), "", 1e-7)
    assert str(exported).splitlines() == [
        "layer                            form    shape  blocks  density             KiB   why",
        "layers.0-11.mlp.fc1 (12 layers)  packed  64x64  8x8     0.210, least 0.100  12.0  at 65 rows 0.3 ms, dense 1.39 ms",
        "layers.0-10.mlp.fc2 (11 layers)  packed  64x64  8x8     0.210, least 0.110  11.0  at 65 rows 0.4 ms, dense 1.39 ms",
        "layers.11.mlp.fc2                dense   64x64  8x8     0.330               1.0   at 65 rows 0.30 ms",
        "layers.0-11.mlp.fc1 -> layers.0-11.mlp.fc2 (12 pairs): 1 to 12 dead features removed, 52 to 63 left",
        "largest difference to the model: 1.0e-07 of the largest output",
        ALL_ROWS,
    ]
    every = exported.table(every_layer=True)
    assert all(f"\n{name} " in every for name in MLP) and every.count("dead features") == 12


def test_surgery_of_many_layers():
    model = nn.ModuleDict()
    for part in range(13):  # each with layers of its own width
        model[f"part{part}"] = nn.ModuleDict({f"{name}_proj": nn.Linear(16, 4 * part + 4) for name in "qk"})
    found = select(model, SparsityConfig(method="static", block_size=4))
    assert str(found).splitlines()[0] == "sparse: part0.{q,k}_proj (2 layers): 4x16 in 4x4 blocks"
    every = found.table(every_layer=True)
    assert len(found.selected) == 26 and all(f"sparse: {each.name}: " in every for each in found.selected)


def test_the_summary_of_a_training_is_short():
    layers = [{"name": name, "block_size": "8x8"} for name in ATTENTION] + [{"name": "head", "block_size": "4x4"}]
    assert _sizes({"layers": layers}) == "8x8 in layers.0-11.attention.{q,k,v,o}_proj (48 layers); 4x4 in head"
    dense = [{"name": name, "reason": f"excluded by {name}"} for name in MLP]
    assert _left_dense(dense) == "layers.0-11.mlp.fc1 (12 layers): excluded by layers.0.mlp.fc1; " + (
        "layers.0-11.mlp.fc2 (12 layers): excluded by layers.0.mlp.fc2"
    )
    assert _left_dense(dense[:2]).count("excluded") == 2
    assert listed(ATTENTION[:3]) == ", ".join(ATTENTION[:3])
