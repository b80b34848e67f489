"""`layer.weight` is built when it is read: it can be read like any tensor, and writing into it is an error."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from kronblocks import BlockSparseLinear, KronblocksError, KroneckerBlockLinear
from kronblocks.nn.mixture import BlockMixtureLinear
from kronblocks.nn.unfolded import UnfoldedConv
from kronblocks.ops import BlockSize

LAYERS = {
    "kron": lambda: KroneckerBlockLinear(8, 12, "3x2", rank=2),
    "free": lambda: BlockSparseLinear(8, 12, "3x2"),
    "mixture": lambda: BlockMixtureLinear(8, 12, {"3x2": BlockSize(3, 2)}, rank=2),
    "convolution": lambda: unfolded(),
}


def unfolded() -> UnfoldedConv:
    layer = UnfoldedConv(nn.Conv2d(8, 12, 1))
    layer.linear = BlockSparseLinear(8, 12, "3x2")
    return layer


@pytest.fixture(params=LAYERS)
def layer(request) -> nn.Module:
    return LAYERS[request.param]()


def add(layer):
    layer.weight += 1


def assign_one(layer):
    layer.weight[0, 0] = 1


def assign_data(layer):
    layer.weight.data = torch.zeros(12, 8)


def assign_parameter(layer):
    layer.weight = nn.Parameter(torch.zeros(12, 8))


def assign_tensor(layer):
    layer.weight = torch.zeros(12, 8)


WRITES = {
    "normal_": lambda layer: nn.init.normal_(layer.weight),
    "constant_": lambda layer: nn.init.constant_(layer.weight, 3.0),
    "kaiming_uniform_": lambda layer: nn.init.kaiming_uniform_(layer.weight),
    "trunc_normal_": lambda layer: nn.init.trunc_normal_(layer.weight),
    "data.normal_": lambda layer: layer.weight.data.normal_(0, 0.02),
    "copy_": lambda layer: layer.weight.copy_(torch.zeros_like(layer.weight)),
    "detach().mul_": lambda layer: layer.weight.detach().mul_(2),
    "a view": lambda layer: layer.weight.flatten(1).t().zero_(),
    "a row": lambda layer: layer.weight[0].zero_(),
    "a part": lambda layer: layer.weight.chunk(2)[1].zero_(),
    "requires_grad_": lambda layer: layer.weight.requires_grad_(False),
    "+=": add,
    "[...] =": assign_one,
    "data =": assign_data,
    "a parameter": assign_parameter,
    "a tensor": assign_tensor,
}


@pytest.mark.parametrize("write", WRITES)
def test_writing_is_refused(layer, write):
    before = layer.weight.clone()
    with torch.no_grad(), pytest.raises(KronblocksError, match="built when it is read"):
        WRITES[write](layer)
    assert torch.equal(layer.weight, before)


def test_reading_is_as_of_any_tensor(layer):
    weight = layer.weight
    flat = weight.flatten(1)
    assert weight.dtype == torch.float32 and weight.device.type == "cpu" and flat.shape == (12, 8)
    assert weight.requires_grad and not isinstance(weight, nn.Parameter)
    for result in (
        weight * 2,
        weight.clone(),
        weight.to(torch.float64),
        weight.sum(),
        nn.functional.linear(torch.ones(3, 8), flat),
    ):
        assert type(result) is torch.Tensor
    result = weight.clone()
    result.zero_()
    weight.square().sum().backward()
    assert all(p.grad is not None for name, p in layer.named_parameters() if not name.endswith("bias"))
    nn.Parameter(weight.clone())


def test_what_is_saved_or_copied_is_an_ordinary_tensor(layer):
    weight = layer.weight.detach()
    file = io.BytesIO()
    torch.save({"weight": weight}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["weight"]
    assert type(loaded) is type(copy.deepcopy(weight)) is torch.Tensor
    assert torch.equal(loaded, weight)


@pytest.mark.slow
def test_in_compiled_code_and_under_torch_func():
    layer = LAYERS["free"]()
    x = torch.randn(3, 8)
    wanted = layer(x)
    function = lambda x: nn.functional.linear(x, layer.weight, layer.bias)  # noqa: E731
    torch.testing.assert_close(torch.compile(function, fullgraph=True, backend="aot_eager")(x), wanted)
    torch.testing.assert_close(torch.vmap(function)(x), wanted)


@pytest.mark.parametrize("mask_", [prune.identity, lambda layer, name: prune.l1_unstructured(layer, name, amount=0.5)])
def test_torchs_pruning_of_a_built_weight_says_what_to_do_instead(make_any, mask_):
    layer = make_any.pruned()
    before = layer.state_dict().keys()
    with pytest.raises(KronblocksError, match=r"weight_orig.*nn.utils.prune cannot mask.*set_block_mask_.*sparsify_.*densify_"):
        mask_(layer, "weight")
    assert layer.state_dict().keys() == before and torch.isfinite(layer(torch.ones(2, 15))).all()
