"""int8 layers: close to what they were made from, in any dtype, saved, loaded and traced."""

from __future__ import annotations

import copy
import io
import json

import pytest
import safetensors.torch
import torch
from torch import nn

from kronblocks import BlockSparseLinear, KronblocksError, from_pretrained, save_pretrained
from kronblocks.nn import QuantizedBlockLinear
from kronblocks.surgery import apply_structure_, structure


def packed(block="4x6", bias=True, n=24, m=20) -> BlockSparseLinear:
    """With dead slots, and slots in another order than the blocks."""
    rows, cols = map(int, block.split("x"))
    layer = BlockSparseLinear(n, m, block, mask=torch.rand(m // rows, n // cols) < 0.8, bias=bias)
    layer.set_block_mask_(layer.block_mask & (torch.rand(layer.grid.shape) < 0.7))
    return layer


def bound(layer: BlockSparseLinear, new: QuantizedBlockLinear, x: torch.Tensor) -> torch.Tensor:
    """What rounding may change (equation 28), and a little for sums in float32."""
    weight, live = layer.dense_weight().double().abs(), layer.grid.expand(layer.block_mask).double()
    factor, scale = x.double().abs().amax(-1, keepdim=True) / 127, new.scales.double()
    rounding = factor / 2 * weight.sum(1) + scale / 2 * (x.double().abs() @ live.T) + factor * scale / 4 * live.sum(1)
    return rounding * (1 + 1e-5) + 1e-6


@pytest.mark.parametrize("bias", [True, False])
def test_within_the_rounding_of_its_weights_and_inputs(bias):
    layer = packed(bias=bias)
    new = QuantizedBlockLinear.from_packed(layer)
    assert new.capacity == int(layer.block_mask.sum()) and torch.equal(new.block_mask, layer.block_mask)
    x = torch.randn(3, 7, 24)
    assert ((new(x) - layer(x)).abs() <= bound(layer, new, x)).all()
    assert (new.weight - layer.weight).abs().max() <= new.scales.max() / 2 * 1.001
    assert not list(new.parameters())
    assert repr(new).endswith(f"block_size=4x6, live={new.capacity}/20, values=int8)")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype_of_the_model_leaves_scales_and_bias(dtype):
    new = QuantizedBlockLinear.from_packed(packed())
    x, scales, bias = torch.randn(5, 24), new.scales.clone(), new.bias.clone()
    expected = new(x.to(dtype))
    model = nn.Sequential(new).to(dtype)
    assert torch.equal(new.scales, scales) and torch.equal(new.bias, bias) and new.values.dtype is torch.int8
    assert torch.equal(model(x.to(dtype)), expected) and expected.dtype is dtype
    assert new.to("meta").scales.is_meta


def test_state_dict_structure_and_copies():
    layer = packed()
    new = QuantizedBlockLinear.from_packed(layer)
    state, x = nn.Sequential(new).state_dict(), torch.randn(4, 24)
    assert list(state) == ["0.values", "0.scales", "0.bias", "0.block_mask"]
    again = nn.Sequential(nn.Linear(24, 20))
    apply_structure_(again, structure(nn.Sequential(new)))
    again.load_state_dict(state)
    assert torch.equal(again(x), new(x)) and torch.equal(copy.deepcopy(new)(x), new(x))
    buffer = io.BytesIO()
    torch.save(new, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), new(x))
    with pytest.raises(KronblocksError, match="made of block_mask, scales, values"):
        new.load_state_dict(layer.state_dict())
    with pytest.raises(KronblocksError, match="block_mask has 0 live blocks, but there are values"):
        nn.Sequential(new).load_state_dict({**state, "0.block_mask": torch.zeros(5, 4).bool()})


def test_a_saved_folder(tmp_path):
    def make():
        return nn.Sequential(nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 3))

    model = make()
    model[0] = QuantizedBlockLinear.from_packed(packed())
    folder, x = save_pretrained(model, tmp_path / "saved"), torch.randn(4, 24)
    card = json.loads((folder / "kronblocks.json").read_text())
    assert card["structure"]["layers"]["0"]["kind"] == "QuantizedBlockLinear"
    stored = safetensors.torch.load_file(folder / card["weights"])
    assert stored["0.values"].dtype is torch.int8 and stored["0.block_mask"].dtype is torch.uint8
    for target in (make, model, lambda: make().bfloat16()):
        again = from_pretrained(folder, target)
        assert isinstance(again[0], QuantizedBlockLinear)
        assert torch.equal(again[0](x), model[0](x))
    stored["0.values"] = stored["0.values"].float()
    safetensors.torch.save_file(stored, folder / card["weights"])
    with pytest.raises(KronblocksError, match=r"0\.values is not int8 in the file"):
        from_pretrained(folder, make, verify=False)


def test_traced():
    torch.compiler.reset()
    new = QuantizedBlockLinear.from_packed(packed()).eval()
    x = torch.randn(5, 24)
    compiled = torch.compile(new, fullgraph=True, backend="aot_eager")
    program = torch.export.export(new, (x,), dynamic_shapes=({0: torch.export.Dim("rows", min=2, max=512)},))
    for rows in (5, 9):
        x = torch.randn(rows, 24)
        assert torch.equal(compiled(x), new(x)) and torch.equal(program.module()(x), new(x))
    nested = torch.nested.nested_tensor([torch.ones(2, 24), torch.ones(3, 24)], layout=torch.jagged)
    assert torch.equal(new(nested).values(), new(torch.ones(5, 24)))


def test_on_the_meta_device_and_what_is_refused():
    with torch.device("meta"):
        new = QuantizedBlockLinear(24, 20, "4x6", capacity=3)
    other = QuantizedBlockLinear.from_packed(packed())
    assert new.values.shape == (3, 4, 6) and new.config()["capacity"] == 3
    new = QuantizedBlockLinear(24, 20, "4x6", capacity=other.capacity, device="meta").to_empty(device="cpu")
    new.load_state_dict(other.state_dict())
    assert torch.equal(new(torch.ones(2, 24)), other(torch.ones(2, 24)))
    layer = packed()
    nn.init.constant_(layer.values, float("nan"))
    layer.enforce_zeros_()
    with pytest.raises(KronblocksError, match="NaN or infinite"):
        QuantizedBlockLinear.from_packed(layer)
    with pytest.raises(KronblocksError, match="at most 131,072 inputs"):
        QuantizedBlockLinear(2**18, 16, 16)
