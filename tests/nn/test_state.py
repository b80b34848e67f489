"""Layers saved, loaded, copied, moved and converted."""

import copy
import io

import pytest
import safetensors.torch
import torch
from torch import nn

from kronblocks import BlockSparseLinear, KroneckerBlockLinear


def assert_same_function(one: nn.Module, other: nn.Module) -> None:
    """The same numbers by possibly different plans: at most 45 fp32 products of size about 1/4."""
    x = torch.randn(7, 15)
    torch.testing.assert_close(one(x), other(x), rtol=1e-5, atol=1e-5)


def test_state_dict_does_not_depend_on_the_plan(make, make_any):
    states = []
    for plan in ("auto", *make.plans):
        torch.manual_seed(1)
        states.append(make.pruned(plan=plan).state_dict())
    names = {"free": {"values", "bias", "block_mask", "block_position"}}.get(make.kind, {"coeff", "tiles", "bias", "block_mask"})
    for state in states:
        assert set(state) == names | ({"gate"} if make.kind == "kron-gate" else set())
        assert all(torch.equal(state[name], states[0][name]) for name in state)


@pytest.mark.parametrize("how", ["torch", "safetensors"])
def test_round_trip_through_a_file(make, how, tmp_path):
    """Into a fresh layer of every plan: the same parameters and function, the mask included."""
    layer, path = make.pruned(), tmp_path / "layer"
    if how == "torch":
        torch.save(layer.state_dict(), path)
        state = torch.load(path, weights_only=True)
    else:
        safetensors.torch.save_file(layer.state_dict(), path)
        state = safetensors.torch.load_file(path)
    for plan in make.plans:
        fresh = make(plan=plan)
        assert not fresh.load_state_dict(state).missing_keys
        assert all(torch.equal(value, layer.state_dict()[name]) for name, value in fresh.state_dict().items())
        assert_same_function(fresh, layer)


def test_loading_inside_a_model(make):
    """The index follows the mask that was loaded, also when the layer is a child, and back again."""
    first, second = nn.Sequential(make(), nn.Tanh()), nn.Sequential(make.pruned(), nn.Tanh())
    whole, pruned = copy.deepcopy(first.state_dict()), copy.deepcopy(second.state_dict())
    first.load_state_dict(pruned)
    assert_same_function(first, second)
    second.load_state_dict(whole)
    first.load_state_dict(whole)
    assert_same_function(first, second)
    assert first[0].density == 1


def test_loading_makes_dead_blocks_exactly_zero(make):
    """A state whose mask and values disagree: the mask wins."""
    state = make().state_dict()
    state["block_mask"] = make.live
    layer = make()
    layer.load_state_dict(state)
    assert (layer.block_norms()[~make.live] == 0).all()
    for parameter in layer.block_parameters():
        if parameter.shape[:2] == (4, 3):
            assert (parameter[~make.live] == 0).all()


def test_deepcopy(make):
    layer = make.pruned()
    other = copy.deepcopy(layer)
    assert_same_function(layer, other)
    before = copy.deepcopy(layer.state_dict())
    other.scale_blocks_(torch.zeros(4, 3))
    other.load_state_dict(make().state_dict())
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert other.density == 1
    assert layer.density == 7 / 12
    assert_same_function(layer, copy.deepcopy(layer))


def test_layers_can_be_pickled(make_any):
    """torch.save of a whole model, and processes that are spawned."""
    torch.save(nn.Sequential(make_any.pruned()), io.BytesIO())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_to_dtype(make, dtype):
    layer = make.pruned()
    expected = layer(torch.ones(2, 15)).detach()
    layer.to(dtype)
    assert layer.block_mask.dtype == torch.bool
    assert all(p.dtype == dtype for p in layer.parameters())
    y = layer(torch.ones(2, 15, dtype=dtype))
    assert y.dtype == layer.weight.dtype == dtype
    # 45 products of size about 1/4, with rounded factors
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_made_in_a_dtype(make_any, dtype):
    layer = make_any(dtype=dtype)
    assert all(p.dtype == dtype and torch.isfinite(p).all() for p in layer.parameters())
    assert layer.block_norms().dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_default_dtype(make_any, dtype, request):
    """As `from_pretrained(dtype=...)` does it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        layer = make_any()
    finally:
        torch.set_default_dtype(before)
    assert all(p.dtype == dtype for p in layer.parameters())


def test_float64_layers_have_orthonormal_tiles_to_float64():
    layer = KroneckerBlockLinear(15, 12, "3x5", rank=4, dtype=torch.float64)
    flat = layer.tiles.detach().flatten(2)[0]
    # a few units of float64
    torch.testing.assert_close(flat @ flat.t(), torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-14)


def test_meta_then_to_empty_then_load(make):
    layer = make.pruned()
    other = make(device="meta")
    assert all(t.is_meta for t in other.state_dict().values())
    other = other.to_empty(device="cpu")
    other.load_state_dict(layer.state_dict())
    assert_same_function(layer, other)


def test_skip_init_then_load(make):
    layer = make.pruned()
    other = nn.utils.skip_init(make.cls, *make.args, plan=make.plan, **make.settings)
    other.load_state_dict(layer.state_dict())
    assert_same_function(layer, other)


def test_skip_init_then_reset(make_factors):
    """Factors only: which blocks have slots is not drawn, so a BlockSparseLinear must be loaded."""
    make = make_factors
    other = nn.utils.skip_init(make.cls, *make.args, plan=make.plan, **make.settings)
    assert isinstance(other, KroneckerBlockLinear)
    other.reset_parameters()
    assert other.density == 1
    assert torch.isfinite(other(torch.randn(7, 15))).all()


def test_the_meta_device_as_context(make, request):
    with torch.device("meta"):
        other = make()
    layer = make.pruned()
    other = other.to_empty(device="cpu")
    other.load_state_dict(layer.state_dict())
    assert_same_function(layer, other)


def test_meta_then_assign(make):
    """load_state_dict(assign=True), the way without to_empty."""
    layer, other = make.pruned(), make(device="meta")
    other.load_state_dict(layer.state_dict(), assign=True)
    assert_same_function(layer, other)


def test_meta_then_assign_then_move(make, request):
    layer, other = make.pruned(), make(device="meta")
    other.load_state_dict(layer.state_dict(), assign=True)
    assert_same_function(layer, other.to("cpu"))


def test_shape_on_the_meta_device(make, request):
    assert make(device="meta")(torch.randn(7, 15, device="meta")).shape == (7, 12)


def test_nothing_is_left_unwritten(make, monkeypatch):
    """With new memory poisoned: constructors, from_linear, from_dense and from_kron write all they make."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(10).isnan().all(), "the poison works"
        layers = [make(), make.pruned()]
        if isinstance(layers[0], KroneckerBlockLinear):
            gate = layers[0].gate is not None
            layers.append(
                KroneckerBlockLinear.from_linear(nn.Linear(15, 12), block_size="3x5", rank=2, gate=gate, plan=make.plan)
            )
            layers.append(BlockSparseLinear.from_kron(layers[0]))
        else:
            layers.append(BlockSparseLinear.from_dense(nn.Linear(15, 12), block_size="3x5", mask=make.live, plan=make.plan))
        for layer in layers:
            assert all(torch.isfinite(t).all() for t in layer.state_dict().values())
            assert torch.isfinite(layer(torch.randn(7, 15))).all()
    finally:
        torch.use_deterministic_algorithms(False)


def test_config_makes_the_same_layer(make):
    layer = make.pruned(bias=False)
    if isinstance(layer, BlockSparseLinear):
        layer.compact_()
    other = type(layer)(**layer.config())
    assert other.config() == layer.config()
    other.load_state_dict(layer.state_dict())
    assert_same_function(layer, other)
