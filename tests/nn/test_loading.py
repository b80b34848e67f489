"""A state_dict holds the whole weight of a block layer or nothing of it, also where loading is not strict."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from kronblocks import BlockSparseLinear, KronblocksError, SparsityConfig, sparsify_
from kronblocks.nn import BlockMixtureLinear
from kronblocks.nn.bsr_linear import BsrLinear
from kronblocks.ops import BlockSize
from kronblocks.surgery import apply_structure_, lift_, structure

CONFIG = SparsityConfig(block_size=8, target_sparsity=0.5)


def dense() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))


def sparse(config: SparsityConfig = CONFIG, model: nn.Module | None = None) -> nn.Module:
    model = dense() if model is None else model
    sparsify_(model, config)
    return model


def lifted() -> nn.Module:
    model = sparse()
    lift_(model)
    return model


def compacted() -> nn.Module:
    """With fewer slots than blocks."""
    model = lifted()
    for layer in (model[0], model[2]):
        layer.set_block_mask_(torch.eye(*layer.grid.shape, dtype=torch.bool))
        layer.compact_()
    return model


def without(state: dict, *names: str) -> dict:
    return {key: value for key, value in state.items() if key.rpartition(".")[2] not in names}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("make", "state", "says"),
    [
        (sparse, lambda: dense().state_dict(), "weight of 0, a KroneckerBlockLinear .* dense model before sparsify_"),
        (lifted, lambda: dense().state_dict(), "weight of 0, a BlockSparseLinear .* dense model before sparsify_"),
        (sparse, lambda: lifted().state_dict(), "values of 0, a KroneckerBlockLinear .*sparsifier.load_state_dict"),
        (lifted, lambda: sparse().state_dict(), "coeff, tiles of 0, a BlockSparseLinear .*apply_structure_"),
        (lifted, lambda: compacted().state_dict(), r"block_position of sizes \(4,\) of 0.* with \(16,\)"),
        (sparse, lambda: sparse(SparsityConfig(block_size=4)).state_dict(), r"block_mask of sizes \(8, 8\) of 0"),
        (sparse, lambda: without(sparse().state_dict(), "block_mask"), "holds bias, coeff, tiles of 0"),
        (lifted, lambda: without(lifted().state_dict(), "block_position"), "holds bias, block_mask, values of 0"),
        (
            lambda: sparse(SparsityConfig(method="kron-l1", block_size=8)),
            lambda: sparse().state_dict(),
            "of 0, a KroneckerBlockLinear made of block_mask, coeff, gate, tiles",
        ),
    ],
)
def test_weights_of_another_layer_are_refused(make, state, says, strict):
    model, loaded = make(), state()
    with pytest.raises(KronblocksError, match=says):
        model.load_state_dict(loaded, strict=strict)


def test_the_layer_is_as_it_was():
    model = sparse()
    before = copy.deepcopy(model[0].state_dict())
    with pytest.raises(KronblocksError):
        model.load_state_dict(lifted().state_dict(), strict=False)
    assert all(torch.equal(value, before[name]) for name, value in model[0].state_dict().items())


def test_layers_inside_others_and_their_relatives():
    """Convolutions over patches, mixtures of a search, layers of an exported model."""
    convolutional = SparsityConfig(block_size=8, target_sparsity=0.5, convolutions=True)
    conv = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Flatten())
    state = conv.state_dict()
    masked = SparsityConfig(method="magnitude", block_size=8, target_sparsity=0.5, convolutions=True)
    for config in (convolutional, masked):
        with pytest.raises(KronblocksError, match="weight of 0, a UnfoldedConv made of linear: load weights of a dense model"):
            sparse(config, copy.deepcopy(conv)).load_state_dict(state, strict=False)
    mixture = nn.Sequential(BlockMixtureLinear(32, 32, {"8x8": BlockSize(8, 8)}, rank=2))
    with pytest.raises(KronblocksError, match="weight of 0, a BlockMixtureLinear made of candidates"):
        mixture.load_state_dict(dense()[:1].state_dict(), strict=False)
    bsr = nn.Sequential(BsrLinear.from_block_sparse(lifted()[0]))
    with pytest.raises(KronblocksError, match="weight of 0, a BsrLinear made of col, crow, values"):
        bsr.load_state_dict(dense()[:1].state_dict(), strict=False)
    bsr.load_state_dict(copy.deepcopy(bsr.state_dict()))


def test_parts_of_a_model_are_loaded():
    """The head alone, biases alone, and what else is in the file."""
    source, model = sparse(), sparse()
    with torch.no_grad():
        source[0].bias.fill_(3)
        source[2].coeff.fill_(2)
    head = {key: value for key, value in source.state_dict().items() if key.startswith("2.")}
    missing, _ = model.load_state_dict(head, strict=False)
    assert set(missing) == {"0.bias", "0.coeff", "0.tiles", "0.block_mask"} and (model[2].coeff == 2).all()
    model.load_state_dict({"0.bias": source[0].bias}, strict=False)
    assert (model[0].bias == 3).all()
    _, unexpected = model.load_state_dict({**source.state_dict(), "0.scale": torch.ones(())}, strict=False)
    assert unexpected == ["0.scale"]


def test_with_the_structure_first_everything_loads():
    source, x = compacted(), torch.randn(4, 32)
    model = sparse()
    apply_structure_(model, structure(source))
    model.load_state_dict(source.state_dict(), strict=False)
    assert isinstance(model[0], BlockSparseLinear) and torch.equal(model(x), source(x))


def test_loads_on_the_meta_device_and_by_assignment():
    source = compacted()
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
    apply_structure_(model, structure(source))
    with pytest.raises(KronblocksError, match="weight of 0"):
        model.load_state_dict(dense().state_dict(), strict=False, assign=True)
    model.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(4, 32)
    assert torch.allclose(model(x), source(x), atol=1e-6)
