"""Exported models compute what the model computes, in every form, and say what became of each layer."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest
import torch
from tests.helpers import config, mlp, trained
from torch import nn

from kronblocks import (
    BlockSparseLinear,
    KronblocksError,
    KroneckerBlockLinear,
    SparsityConfig,
    export,
    from_pretrained,
    sparsify_,
)
from kronblocks.nn.bsr_linear import BsrLinear
from kronblocks.ops.costs import timing
from kronblocks.ops.costs.choice import DeployedForm, choose_plan
from kronblocks.ops.costs.counts import estimated_seconds
from kronblocks.ops.costs.timing_cache import forget_timings


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(timing, "BUDGET", 0.0)
    forget_timings()
    yield
    forget_timings()


def dense() -> nn.Sequential:
    return nn.Sequential(nn.Linear(24, 16), nn.GELU(), nn.Linear(16, 12, bias=False), nn.Dropout(0.5), nn.Linear(12, 5))


def sparse() -> nn.Sequential:
    """Factors with gates, free values with dead slots, and a dense layer; in training mode."""
    torch.manual_seed(0)
    model = dense()
    model[0] = KroneckerBlockLinear(24, 16, 4, rank=2, tile_groups=4, gate=True)
    with torch.no_grad():
        model[0].gate.uniform_(0.5, 2)
    model[0].set_block_mask_(torch.rand(4, 6) < 0.5)
    model[2] = BlockSparseLinear(16, 12, 4, mask=torch.rand(3, 4) < 0.8, bias=False)
    model[2].set_block_mask_(model[2].block_mask & (torch.rand(3, 4) < 0.7))
    return model


KINDS = {
    "dense": (nn.Linear, nn.Linear),
    "packed": (BlockSparseLinear, BlockSparseLinear),
    "factored": (KroneckerBlockLinear, BlockSparseLinear),
    "bsr": (BsrLinear, BsrLinear),
}


@pytest.mark.parametrize("form", [*KINDS, "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_form_computes_the_same_and_leaves_the_model_alone(form, dtype):
    model, x = sparse().to(dtype), torch.randn(3, 7, 24, dtype=dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    exported = export(model, x, form=form, slim=False)
    torch.testing.assert_close(exported.model(x), model.eval()(x))
    model.train()
    assert exported.error < 1e-5 and not exported.model.training
    assert not any(p.requires_grad for p in exported.model.parameters())
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert [layer.name for layer in exported.layers] == ["0", "2"] and [layer.rows for layer in exported.layers] == [21, 21]
    assert [layer.density for layer in exported.layers] == [model[0].density, model[2].density]
    if form != "auto":
        assert tuple(type(exported.model[i]) for i in (0, 2)) == KINDS[form]
        assert exported.layers[0].form == form and exported.layers[0].why == "asked for"
    assert "largest difference" in str(exported)


def test_the_fastest_form_is_taken(monkeypatch):
    forms, timed = {16: "values", 12: "dense"}, {"values": 4e-4, "coeff_first": 5e-4, "dense": 3e-3}
    module = importlib.import_module("kronblocks.deploy.forms")
    monkeypatch.setattr(module, "choose_deployed", lambda problem, int8: DeployedForm(forms[problem.grid.out_features], timed))
    exported = export(sparse(), torch.randn(7, 24), slim=False)
    assert [layer.form for layer in exported.layers] == ["packed", "dense"]
    assert exported.layers[0].why == "at 7 rows 0.4 ms, dense 3 ms; live blocks computed from the factors"
    assert exported.layers[1].why == "at 7 rows 3 ms, values 0.4 ms"
    assert exported.manifest()["layers"][0]["timed"] == timed
    forms |= {16: "coeff_first", 12: "packed"}
    exported = export(sparse(), torch.randn(7, 24), slim=False)
    assert [layer.form for layer in exported.layers] == ["factored", "packed"]
    assert exported.model[0].active_plan == "coeff_first" and exported.model[0].gate is None


def test_factors_get_the_plan_that_is_least_work_in_inference():
    layer = KroneckerBlockLinear(64, 64, 4, rank=1, tile_groups=16)
    plan = export(nn.Sequential(layer), torch.randn(64, 64), form="factored").model[0].active_plan
    training, inference = (layer.problem(rows=64, training=training) for training in (True, False))
    least = {p: estimated_seconds(inference, p) for p in ("tile_first", "coeff_first")}
    assert plan == min(least, key=least.__getitem__) != choose_plan(training).plan


def test_only_live_blocks_are_stored():
    exported = export(sparse(), torch.randn(7, 24), form="packed", slim=False)
    live = int(sparse()[2].block_mask.sum())
    assert exported.model[2].capacity == live
    assert exported.layers[1].bytes == live * (16 * 4 + 8) + 12  # values, positions, the mask


def test_saved_and_loaded(tmp_path):
    x = torch.randn(7, 24)
    exported = export(sparse(), x, form="factored")
    folder = exported.save(tmp_path / "out")
    torch.testing.assert_close(from_pretrained(folder, dense())(x), exported.model(x))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest == json.loads(json.dumps(exported.manifest())) and manifest["version"] == 1
    with pytest.raises(KronblocksError, match="export with form='packed'"):
        export(sparse(), x, form="bsr").save(tmp_path / "bsr")


def test_methods_on_plain_layers_are_packed_by_their_masks():
    model = dense()
    sparsifier = sparsify_(model, SparsityConfig(method="magnitude", block_size=4, target_sparsity=0.5))
    for target in sparsifier.targets:
        target.layer.set_block_mask_(torch.rand(target.grid.shape) < 0.5)
    x = torch.randn(7, 24)
    with pytest.raises(KronblocksError, match="no block layer to export"):
        export(model, x)
    exported = export(model, x, sparsifier=sparsifier, form="packed")
    assert isinstance(exported.model[0], BlockSparseLinear) and isinstance(model[0], nn.Linear)
    torch.testing.assert_close(exported.model(x), model.eval()(x))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = BlockSparseLinear(8, 8, 2, mask=torch.eye(4).bool())
        self.b, self.unused = self.a, BlockSparseLinear(8, 8, 2)

    def forward(self, x, *, scale):
        return {"sum": self.b(self.a(x)) * scale, "parts": (x, [x.argmax()])}


def test_keyword_arguments_nested_outputs_shared_and_unused_layers():
    exported = export(Pair(), {"x": torch.randn(2, 8), "scale": 2.0}, form="dense")
    assert exported.model.a is exported.model.b and len(exported.layers) == 2
    assert export(Pair(), {"x": torch.randn(2, 8), "scale": 2.0}).layers[1].why == "the example does not reach it"


class ByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = BlockSparseLinear(8, 8, 2, mask=torch.eye(4).bool())

    def forward(self, x):
        return self.layer(input=x)


@pytest.mark.parametrize("form", ["auto", "dense", "packed", "bsr"])
def test_layers_that_are_called_by_keyword(form):
    model, x = ByName(), torch.randn(3, 8)
    torch.testing.assert_close(export(model, x, form=form).model(x), model(x))


def test_a_single_layer_and_wrong_arguments():
    layer = BlockSparseLinear(8, 8, 2)
    x = torch.randn(3, 8)
    torch.testing.assert_close(export(layer, x, form="dense").model(x), layer(x))
    with pytest.raises(KronblocksError, match="write one of 'auto', 'dense'"):
        export(layer, x, form="fast")
    with pytest.raises(KronblocksError, match="differ by"):
        export(nn.Sequential(layer, Noise()), x)
    with pytest.raises(KronblocksError, match="square blocks, not 2x4"):
        export(BlockSparseLinear(8, 8, "2x4"), x, form="bsr")


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


LOADED = """
import sys, torch, kronblocks
for form in sys.argv[2:]:
    program = torch.export.load(f"{sys.argv[1]}/{form}.pt2")
    expected = torch.load(f"{sys.argv[1]}/{form}.pt", weights_only=True)
    torch.testing.assert_close(program.module()(expected["x"]), expected["y"], rtol=1e-5, atol=1e-5)
"""


@pytest.mark.slow
def test_through_torch_export_to_files_and_a_new_process(tmp_path):
    """One that imports torch and kronblocks, and nothing else."""
    forms = ("dense", "packed", "factored")
    for form in forms:
        model, x = sparse().eval(), torch.randn(7, 24)
        exported = export(model, x, form=form)
        rows = torch.export.Dim("rows", min=2, max=512)
        program = torch.export.export(exported.model, (x,), dynamic_shapes=({0: rows},))
        for size in (7, 2, 65):
            x = torch.randn(size, 24)
            torch.testing.assert_close(program.module()(x), model(x).detach(), rtol=1e-5, atol=1e-5)
        torch.export.save(program, tmp_path / f"{form}.pt2")
        torch.save({"x": x, "y": model(x).detach()}, tmp_path / f"{form}.pt")
    subprocess.run([sys.executable, "-c", LOADED, str(tmp_path), *forms], check=True)


@pytest.mark.parametrize("form", ["dense", "packed", "factored"])
def test_through_torch_compile_without_a_break(form):
    torch.compiler.reset()
    model, x = sparse().eval(), torch.randn(7, 24)
    exported = export(model, x, form=form)
    compiled = torch.compile(exported.model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for size in (7, 9):
            x = torch.randn(size, 24)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)


class Outputs(nn.Module):
    """Whatever a model may return beside numbers."""

    def __init__(self, make):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.norm, self.make = BlockSparseLinear(32, 16, 4, mask=torch.eye(4, 8).bool()), nn.BatchNorm1d(16), make

    def forward(self, x):
        return self.make(self.norm(self.layer(x)))


def test_what_is_compared():
    x = torch.randn(5, 32)
    with pytest.raises(KronblocksError, match="no floating-point tensors"):
        export(Outputs(lambda y: y.argmax(1)), x)
    masked = export(Outputs(lambda y: y.masked_fill(y < 0, float("-inf"))), x, form="packed", slim=False)
    assert masked.error < 1e-5
    calls = iter([0.0, *[float("nan")] * 9])
    with pytest.raises(KronblocksError, match="differ by inf"):
        export(Outputs(lambda y: (y, y.sum() * 0 + next(calls))), x, form="packed", slim=False)


def test_frozen_layers_stay_frozen():
    model = Outputs(lambda y: y).train()
    model.norm.eval()
    export(model, torch.randn(5, 32), form="packed")
    assert model.training and model.layer.training and not model.norm.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_lower_precision_can_be_exported(dtype):
    model = mlp()
    trained(model, config())
    model.to(dtype)
    assert export(model, torch.randn(4, 32, dtype=dtype), form="dense").error < 0.05
