"""Fast paths of torch for transformers go past the layers: block layers keep them out, and build no weight for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from kronblocks import KronblocksError, SparsityConfig, densify_, from_pretrained, save_pretrained, sparsify_
from kronblocks.deploy import export
from kronblocks.nn.base import BlockLayer
from kronblocks.nn.block_sparse_linear import BlockSparseLinear
from kronblocks.nn.kron_linear import KroneckerBlockLinear

pytestmark = pytest.mark.filterwarnings("ignore:only .* of the model's weights")  # attention is most of these small encoders
PADDED = torch.tensor([[False] * 5 + [True] * 3, [False] * 8])


def encoder(**settings) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, **settings)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)


def sparse(method: str = "static", exclude: tuple[str, ...] = (), **settings) -> nn.TransformerEncoder:
    model = encoder(**settings)
    sparsify_(model, SparsityConfig(method=method, block_size=8, target_sparsity=0.5, exclude=exclude))  # pyright: ignore
    return model


def saved_and_loaded(folder) -> nn.Module:
    save_pretrained(sparse(), folder)
    return from_pretrained(folder, encoder())


def densified(folder) -> nn.Module:
    densify_(model := sparse())
    return model


MODELS = {
    "factors": lambda folder: sparse("two-phase"),
    "values": lambda folder: sparse(),
    "loaded": saved_and_loaded,
    "exported": lambda folder: export(sparse(), torch.randn(2, 8, 32), form="packed").model,
    "exported as BSR": lambda folder: export(sparse(), torch.randn(2, 8, 32), form="bsr").model,
    "densified": densified,
    "the first layer dense": lambda folder: sparse(exclude=("layers.0.*",)),
    "the first product dense": lambda folder: sparse(exclude=("layers.0.linear1",)),
    "norm first": lambda folder: sparse(norm_first=True),
}


@pytest.fixture(params=MODELS)
def model(request, tmp_path) -> nn.Module:
    return MODELS[request.param](tmp_path).eval()


@pytest.fixture
def past_the_layers() -> Iterator[None]:
    """Lets tests see torch's fast paths off, and puts them back."""
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.fixture
def built(monkeypatch) -> list[str]:
    """The weights that were built."""
    found: list[str] = []
    for kind in (KroneckerBlockLinear, BlockSparseLinear):
        build = kind.dense_weight
        monkeypatch.setattr(kind, "dense_weight", lambda self, build=build: (found.append(self.kind), build(self))[1])
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True, but")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("mask", [None, PADDED])
def test_encoders_in_eval_give_what_their_layers_give(model, mask, grad, past_the_layers, built):
    for layer in model.modules():
        if isinstance(layer, BlockLayer):
            layer.use_plan_("packed")
    x, seen = torch.randn(2, 8, 32), slice(None) if mask is None else ~mask
    with torch.set_grad_enabled(grad):
        y = model(x, src_key_padding_mask=mask)
        torch.backends.mha.set_fastpath_enabled(False)
        torch.testing.assert_close(y[seen], model(x, src_key_padding_mask=mask)[seen])
    assert not built


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("exclude", [(), ("layers.0.*",)])
@pytest.mark.parametrize("settings", [{"method": "two-phase"}, {"method": "rigl"}, {"method": "rigl", "storage": "dense"}])
def test_validation_with_padding_while_hooks_are_on_the_layers(settings, exclude):
    """Before the first step layers are watched, and before exchanges probed; torch makes nested tensors if it may."""
    model = encoder()
    sparsifier = sparsify_(model, SparsityConfig(block_size=8, exclude=exclude, **settings))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sparsifier.attach(optimizer, total_steps=20)
    x = torch.randn(2, 8, 32)
    for _ in range(20):
        with torch.no_grad():
            assert model.eval()(x, src_key_padding_mask=PADDED).shape == x.shape
        model.train()(x, src_key_padding_mask=PADDED)[~PADDED].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.slow
def test_compiled_encoders_call_their_layers_too():
    model, x, called = sparse().eval(), torch.randn(2, 8, 32), []

    def backend(graph, inputs):
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, src_key_padding_mask=PADDED), model(x, src_key_padding_mask=PADDED))
    assert sum("packed_linear" in name for name in called) == 4 and not any("encoder_layer_fwd" in name for name in called)


def test_what_code_asks_of_weights_does_not_build_them(built):
    """Such as T5's, which converts its input to `wo.weight.dtype` twice a layer."""
    for layer in (KroneckerBlockLinear(16, 8, 4, 2, dtype=torch.bfloat16), BlockSparseLinear(16, 8, 4, dtype=torch.bfloat16)):
        weight = layer.weight
        assert isinstance(weight, Tensor) and weight.dtype == torch.bfloat16 and weight.device == torch.device("cpu")
        assert (
            weight.shape == (8, 16) and weight.size(1) == 16 and weight.dim() == 2 and len(weight) == 8 and weight.numel() == 128
        )
        assert weight.requires_grad and not weight.is_cuda and weight.is_floating_point() and not weight.is_nested
        with torch.no_grad():
            assert not layer.weight.requires_grad
        assert not built
        assert weight.detach().shape == (8, 16) and built.pop()


def test_weights_of_convolutions_are_not_built_for_their_dtype_either(built):
    """ViT's patch embedding converts images to `projection.weight.dtype`."""
    model = nn.Sequential(nn.Conv2d(4, 8, 3))
    sparsify_(model, SparsityConfig(method="static", block_size=4, convolutions=True, target_sparsity=0.5))
    before = len(built)
    assert model[0].weight.dtype == torch.float32 and model[0].weight.shape == (8, 4, 3, 3) and len(built) == before
    assert model[0].weight.flatten(1).shape == (8, 36) and len(built) == before + 1


def test_a_weight_is_that_of_the_layer_when_it_is_used():
    layer = KroneckerBlockLinear(16, 8, 4, 2)
    before, kept = layer.weight, layer.weight.detach().clone()
    with torch.no_grad():
        layer.coeff.add_(1)
    with pytest.raises(KronblocksError, match="has changed since its weight was read"):
        before.sum()
    assert not torch.equal(layer.weight, kept)


def test_gradients_reach_the_layer_from_its_weight():
    layer, other = KroneckerBlockLinear(16, 8, 4, 2), KroneckerBlockLinear(16, 8, 4, 2)
    other.load_state_dict(layer.state_dict())
    layer.weight.square().sum().backward()
    other.dense_weight().square().sum().backward()
    assert torch.equal(layer.coeff.grad, other.coeff.grad) and layer.coeff.grad.any()


def test_under_autocast_a_weight_has_the_dtype_that_it_says():
    layer = KroneckerBlockLinear(16, 8, 4, 2)
    with torch.autocast("cpu"):
        assert layer.weight.dtype == layer.weight.clone().dtype == torch.float32
