"""Damaged and hostile model folders: refused, the model as it was to the bit; or the values of the files, each in its place."""

from __future__ import annotations

import functools
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import check_layers_agree
from tests.reliability.fuzzing import QUIET, VALUES, Tally, at_most, bits, cases, everything, refused, small
from torch import Tensor, nn

from kronblocks import SparsityConfig, from_pretrained, save_pretrained, sparsify_
from kronblocks.nn.base import BlockLayer
from kronblocks.ops import reference

pytestmark = pytest.mark.slow

KINDS = ["packed", "factored"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    """Folders of a model with live blocks only, and of one with factors and dead blocks."""
    packed, factored = small(), small()
    sparsify_(packed, SparsityConfig(block_size=4, method="static", target_sparsity=0.5))
    sparsify_(factored, SparsityConfig(block_size=4, rank=2, measure_plans=False))
    for layer in factored.modules():
        if isinstance(layer, BlockLayer):
            layer.set_block_mask_(torch.rand(layer.grid.shape) < 0.6)
    root = tmp_path_factory.mktemp("saved")
    return {kind: save_pretrained(model, root / kind) for kind, model in (("packed", packed), ("factored", factored))}


def weights_of(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def damaged(data: bytes, kind: str, where: float, value: int) -> bytes:
    place = int(where * (len(data) - 1))
    return {
        "truncated": data[:place],
        "flipped": data[:place] + bytes([data[place] ^ (value or 1)]) + data[place + 1 :],
        "zeros": data[:place] + bytes(len(data) - place),
        "inserted": data[:place] + bytes([value]) * 8 + data[place:],
        "foreign": pickle.dumps({"hello": value}),
        "empty": b"",
    }[kind]


DAMAGE = st.sampled_from(["truncated", "flipped", "flipped", "flipped", "zeros", "inserted", "foreign", "empty"])


def dense_weight(tensors: dict[str, Tensor], name: str, shape: tuple[int, int]) -> Tensor:
    """The dense weight of a layer of 4x4 blocks, from a file's tensors, by the format's description and no code of saving."""
    grid = (shape[0] // 4, shape[1] // 4)
    flags = [byte >> bit & 1 for byte in tensors[f"{name}.block_mask"].tolist() for bit in range(8)]
    mask = torch.tensor(flags[: grid[0] * grid[1]], dtype=torch.bool).view(grid)
    if f"{name}.values" in tensors:
        blocks = torch.zeros(*grid, 4, 4)
        blocks[mask] = tensors[f"{name}.values"].float()
        return blocks.transpose(1, 2).reshape(shape)
    tiles = tensors[f"{name}.tiles"].float()
    coeff = torch.zeros(*grid, tiles.shape[1])
    coeff[mask] = tensors[f"{name}.coeff"].float()
    return reference.kron_weight(coeff, tiles)


def check_holds(model: nn.Sequential, tensors: dict[str, Tensor]) -> None:
    """The model has the values of a file: live blocks and biases to the bit, a weight of factors up to rounding."""
    for name, shape in (("0", (32, 16)), ("2", (8, 32))):
        layer = model.get_submodule(name)
        assert isinstance(layer, BlockLayer) and isinstance(layer.bias, Tensor)
        assert bits(layer.bias.detach()) == bits(tensors[f"{name}.bias"].float())
        weight, wanted = layer.dense_weight().detach(), dense_weight(tensors, name, shape)
        if layer.rank is None:
            assert bits(weight) == bits(wanted)
        else:
            assert bits(layer.tiles.detach()) == bits(tensors[f"{name}.tiles"].float())
            assert bits(layer.coeff.detach()[layer.block_mask]) == bits(tensors[f"{name}.coeff"].float())
            assert torch.allclose(weight, wanted, rtol=1e-4, atol=1e-6, equal_nan=True)
    assert not model.training
    check_layers_agree(model)


def attempt(folder: Path, tensors: Any, tally: Tally) -> None:
    """Load a folder into a new model, whatever the hash says: refused, and nothing has changed, or right."""
    model = small()
    before = everything(model)
    if refused(functools.partial(from_pretrained, verify=False), folder, model):
        tally.refused += 1
        assert everything(model) == before
    else:
        tally.accepted += 1
        check_holds(model, tensors())


def test_saved_models(saved, tmp_path, record):
    tally = Tally()

    @settings(max_examples=cases(100, 4000), **QUIET)
    @given(st.sampled_from(KINDS), st.sampled_from(["card", "weights"]), DAMAGE, st.floats(0, 1), st.integers(0, 255))
    def run(model, file, kind, where, value):
        folder = tmp_path / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(saved[model], folder)
        path = weights_of(folder) if file == "weights" else folder / "kronblocks.json"
        path.write_bytes(damaged(path.read_bytes(), kind, where, value))
        attempt(folder, lambda: safetensors.torch.load(weights_of(folder).read_bytes()), tally)

    with at_most(256):
        run()
    tally.check(1 / 20)
    record(
        "damaged model folders",
        f"{tally.tried:,} folders with bytes cut off, flipped, zeroed, inserted or foreign, read with verify=False",
        f"{tally.refused:,} refused, the model as it was, bit for bit; the other {tally.accepted:,} gave the values that are in "
        "the file, each in its place, and layers that compute with them; never more than 256 MiB of memory",
    )


def test_hostile_cards(saved, tmp_path, record):
    tally = Tally()
    folders = {kind: shutil.copytree(path, tmp_path / kind) for kind, path in saved.items()}
    cards = {kind: json.loads((path / "kronblocks.json").read_text()) for kind, path in saved.items()}
    tensors = {kind: safetensors.torch.load_file(weights_of(path)) for kind, path in saved.items()}
    places = [(), ("structure",), ("structure", "layers"), ("structure", "layers", "0"), ("structure", "layers", "2")]

    @settings(max_examples=cases(100, 4000), **QUIET)
    @given(st.sampled_from(KINDS), st.sampled_from(places), st.integers(0, 20), VALUES, st.booleans())
    def run(kind, place, which, value, new):
        changed = json.loads(json.dumps(cards[kind]))
        inner = changed
        for step in place:
            inner = inner[step]
        inner["new" if new else sorted(inner)[which % len(inner)]] = value
        (folders[kind] / "kronblocks.json").write_text(json.dumps(changed))
        attempt(folders[kind], lambda: tensors[kind], tally)

    with at_most(256):
        run()
    tally.check(1 / 20)
    record(
        "hostile cards",
        f"{tally.tried:,} kronblocks.json with values of any kind, sizes of 2^63 among them",
        f"{tally.refused:,} refused, the model as it was, bit for bit; the other {tally.accepted:,} gave the saved model; never "
        "more than 256 MiB of memory",
    )
