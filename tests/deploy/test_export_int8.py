"""Export with int8 values: what is chosen, checked, said, saved and refused."""

from __future__ import annotations

import json

import pytest
import torch
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
from kronblocks.deploy import quantizing
from kronblocks.integrations.onnx import save_onnx
from kronblocks.nn import QuantizedBlockLinear
from kronblocks.ops.costs import choice, timing
from kronblocks.ops.costs.timing_cache import forget_timings


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(timing, "BUDGET", 0.0)
    forget_timings()
    yield
    forget_timings()


def dense() -> nn.Sequential:
    return nn.Sequential(nn.Linear(24, 16), nn.GELU(), nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 5))


def sparse() -> nn.Sequential:
    """A factored layer, one of free values, and a dense one."""
    torch.manual_seed(0)
    model = dense()
    model[0] = KroneckerBlockLinear(24, 16, 4, rank=2)
    model[0].set_block_mask_(torch.rand(4, 6) < 0.6)
    model[2] = BlockSparseLinear(16, 12, "3x4", mask=torch.rand(4, 4) < 0.6)
    return model.eval()


def test_every_block_layer_and_what_is_said(tmp_path):
    model, x = sparse(), torch.randn(9, 24)

    def mean_square(each: nn.Module) -> float:
        assert not each.training
        return each(x).square().mean()

    exported = export(model, x, form="packed-int8", slim=False, evaluate=mean_square)
    assert [type(exported.model[i]) for i in (0, 2, 4)] == [QuantizedBlockLinear, QuantizedBlockLinear, nn.Linear]
    first = exported.layers[0]
    live = int(model[0].block_mask.sum())
    assert first.form == "packed-int8" and first.bytes == live * 16 + 16 * (4 + 4) + 24  # values, scales and bias, mask
    rounding = [layer.rounding or 0.0 for layer in exported.layers]
    assert 0 < rounding[0] < 0.05
    assert 0 < exported.error <= 2 * sum(rounding)
    text = str(exported)
    assert f"at most {max(rounding):.1e} of a layer's largest output" in text
    assert exported.scores is not None and exported.scores == (mean_square(model).item(), mean_square(exported.model).item())
    assert f"evaluated: {exported.scores[0]:.6g} for the model" in text
    manifest = json.loads((exported.save(tmp_path / "out") / "manifest.json").read_text())
    assert manifest["scores"]["exported"] == exported.scores[1] and manifest["layers"][0]["rounding"] == first.rounding
    again = from_pretrained(tmp_path / "out", dense)
    assert torch.equal(again(x), exported.model(x))
    with pytest.raises(KronblocksError, match="ONNX has no product for int8 blocks"):
        save_onnx(exported.model, x, tmp_path / "model.onnx")


def test_slimmed_and_in_low_precision(tmp_path):
    model = sparse().bfloat16()
    model[2].set_block_mask_(model[2].block_mask & (torch.arange(4) > 0).unsqueeze(1))
    x = torch.randn(9, 24, dtype=torch.bfloat16)
    exported = export(model, x, form="packed-int8")
    assert exported.slimmed and exported.model[2].scales.dtype is torch.float32
    again = from_pretrained(exported.save(tmp_path), lambda: dense().bfloat16())
    assert torch.equal(again(x), exported.model(x))


def test_auto_chooses_it_where_it_is_allowed_and_fastest(monkeypatch):
    seconds = {"F.linear": 4.0, "packed-int8": 1.0}
    monkeypatch.setattr(choice, "_deployed_forms", lambda problem: {"packed": 3.0, "dense": 8.0})
    monkeypatch.setattr(choice, "measure_int8", lambda problem: dict(seconds))
    model, x = sparse(), torch.randn(9, 24)
    assert [layer.form for layer in export(model, x).layers] == ["packed", "packed"]
    exported = export(model, x, precision="int8")
    assert [layer.form for layer in exported.layers] == ["packed-int8"] * 2
    assert exported.layers[0].timed == {"packed": 3.0, "dense": 8.0, "packed-int8": 2.0}
    seconds["packed-int8"] = 1.45  # 2.9 beside 3.0: not clearly faster
    assert [layer.form for layer in export(model, x, precision="int8").layers] == ["packed", "packed"]


class Seen(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)

    def forward(self, x):
        return self.conv(x)


def test_convolutions_only_if_asked_for(monkeypatch):
    monkeypatch.setattr(choice, "_deployed_forms", lambda problem: {"packed": 3.0, "dense": 8.0})
    monkeypatch.setattr(choice, "measure_int8", lambda problem: {"F.linear": 4.0, "packed-int8": 1.0})
    model = Seen()
    config = SparsityConfig(method="static", block_size=4, target_sparsity=0.5, convolutions=True)
    sparsify_(model, config)
    x = torch.randn(2, 4, 6, 6)
    assert [layer.form for layer in export(model, x, precision="int8").layers] == ["packed"]
    exported = export(model, x, form="packed-int8")
    whole, calls = exported.model.conv.linear, []
    monkeypatch.setattr(whole, "dense_weight", lambda: calls.append(1))
    assert 0 < (exported.model(x) - model.eval()(x)).abs().max() < 0.05 and not calls


def test_it_is_timed():
    problem = sparse()[2].problem(rows=40, training=False)
    assert {*timing.measure_int8(problem)} == {"F.linear", "packed-int8"}
    assert choice.choose_deployed(problem, int8=True).timed["packed-int8"] > 0


def test_wrong_results_are_refused(monkeypatch):
    x = torch.randn(9, 24)
    monkeypatch.setattr(QuantizedBlockLinear, "from_packed", classmethod(lambda cls, layer: _wrong(layer)))
    with pytest.raises(KronblocksError, match="0 with int8 values differs from the float layer by more than rounding"):
        export(sparse(), x, form="packed-int8")
    monkeypatch.undo()
    monkeypatch.setattr(quantizing, "_relative_error", lambda *_: 0.0)
    with pytest.raises(KronblocksError, match="differ by"):
        export(sparse(), x, form="packed-int8")


_right = QuantizedBlockLinear.from_packed


def _wrong(layer: BlockSparseLinear) -> QuantizedBlockLinear:
    new = _right(layer)
    new.scales[3] *= 1.1
    return new


def test_settings_that_contradict_each_other():
    with pytest.raises(KronblocksError, match="precision='int8' is for form='auto' or 'packed-int8', not 'dense'"):
        export(sparse(), torch.randn(9, 24), form="dense", precision="int8")
    with pytest.raises(KronblocksError, match="write one of 'same', 'int8'"):
        export(sparse(), torch.randn(9, 24), precision="int4")
    with pytest.raises(KronblocksError, match="evaluate returned str, not a number"):
        export(sparse(), torch.randn(9, 24), form="packed", evaluate=lambda model: "good")
