"""ONNX files compute what the model computes, in onnxruntime."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kronblocks import BlockSparseLinear, KronblocksError, KroneckerBlockLinear
from kronblocks.deploy import export
from kronblocks.integrations import onnx as module
from kronblocks.integrations.onnx import PlainFactors, save_onnx

pytestmark = [pytest.mark.slow, pytest.mark.needs("onnx")]


def run(path, *inputs):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    return torch.from_numpy(session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})[0])


def factors(tile_groups: int = 1, gate: bool = False) -> KroneckerBlockLinear:
    layer = KroneckerBlockLinear(24, 16, "4x3", rank=2, tile_groups=tile_groups, gate=gate)
    with torch.no_grad():
        if layer.gate is not None:
            layer.gate.uniform_(0.5, 2)
    layer.set_block_mask_(torch.rand(4, 8) < 0.6)
    return layer


@pytest.mark.parametrize(("tile_groups", "gate"), [(1, False), (1, True), (2, False), (4, True)])
def test_plain_factors_are_the_layer(tile_groups, gate):
    layer = factors(tile_groups, gate).double()
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    torch.testing.assert_close(PlainFactors(layer)(x), layer(x))


@pytest.mark.parametrize("form", ["dense", "factored"])
def test_the_file_computes_the_same_for_any_batch(tmp_path, form):
    model = nn.Sequential(
        factors(4, True), nn.GELU(), BlockSparseLinear(16, 12, 4, mask=torch.rand(3, 4) < 0.6), nn.Linear(12, 3)
    )
    made = save_onnx(model, torch.randn(5, 24), tmp_path / "model.onnx", form=form)
    assert made.path.exists() and made.error < 1e-5
    for batch in (1, 5, 9):
        x = torch.randn(batch, 24)
        torch.testing.assert_close(run(made.path, x), model.eval()(x), rtol=1e-5, atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_exported_models_can_be_saved_too_and_fixed_batches_stay_fixed(tmp_path):
    model = nn.Sequential(factors(), nn.ReLU(), nn.Linear(16, 3))
    x = torch.randn(5, 24)
    made = save_onnx(export(model, x, form="packed").model, x, tmp_path / "model.onnx", dynamic_batch=False)
    torch.testing.assert_close(run(made.path, x), model.eval()(x), rtol=1e-5, atol=1e-5)


def test_a_transformers_model_by_keyword(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3)
    model = transformers.ViTForImageClassification(config).eval()
    name = next(name for name, each in model.named_modules() if isinstance(each, nn.Linear) and each.out_features == 64)
    model.set_submodule(name, KroneckerBlockLinear.from_linear(model.get_submodule(name), block_size=8, rank=4))
    x = torch.randn(2, 3, 8, 8)
    made = save_onnx(model, {"pixel_values": x}, tmp_path / "vit.onnx", form="factored")
    torch.testing.assert_close(run(made.path, x), model(x).logits, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_is_an_error_and_leaves_no_file(tmp_path, monkeypatch):
    model, x = nn.Sequential(factors()), torch.randn(5, 24)
    path = tmp_path / "model.onnx"
    with pytest.raises(KronblocksError, match="write one of 'dense', 'factored'"):
        save_onnx(model, x, path, form="packed")
    with pytest.raises(KronblocksError, match="inputs are tensors"):
        save_onnx(nn.Identity(), ("x",), path)
    with pytest.raises(KronblocksError, match="cannot write"):
        save_onnx(model, x, tmp_path / "none" / "model.onnx")
    with monkeypatch.context() as patch:
        patch.setattr(module, "_run", lambda path, inputs: [(model(x) + 1).detach().numpy()])
        with pytest.raises(KronblocksError, match="in onnxruntime outputs differ"):
            save_onnx(model, x, path)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(KronblocksError, match="pip install onnx onnxscript onnxruntime"):
        save_onnx(model, x, path)
    assert list(tmp_path.iterdir()) == []
