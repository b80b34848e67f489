"""Layers named by shape, by import path, by file."""

from __future__ import annotations

import sys

import pytest
import safetensors.torch
import torch
from torch import nn

from kronblocks import KronblocksError
from kronblocks.advice.layers import linears


def found(layers) -> list[tuple[str, int, int, int]]:
    """(name, out, in, count) of every nn.Linear."""
    return [
        (name, module.out_features, module.in_features, counts.get(name, 1))
        for model, counts in linears(layers)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]


def test_shapes():
    assert found("64x32") == [("64x32", 64, 32, 1)]
    assert found(["64x32*3", "8x4", "64x32"]) == [("64x32", 64, 32, 4), ("8x4", 8, 4, 1)]
    ((model, _),) = linears(["1000000x1000000"])
    assert all(parameter.is_meta for parameter in model.parameters()), "nothing is allocated"


def test_models():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 5))
    assert found(model) == [("0", 2, 3, 1), ("1", 5, 2, 1)]
    assert found(nn.Linear(3, 2)) == [("model", 2, 3, 1)]


def test_import_paths(tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Sequential(nn.Linear(3, 2))\nsize = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    assert found(["my_models:make", "8x4"]) == [("8x4", 8, 4, 1), ("0", 2, 3, 1)]
    assert sys.path == path
    for text, says in (
        ("my_models:nothing", "cannot import"),
        ("no_models:make", "cannot import"),
        ("my_models:size", "is int and cannot be called"),
        ("json:loads", "a function without arguments"),
        ("os:getcwd", "returned str"),
    ):
        with pytest.raises(KronblocksError, match=says):
            linears(text)


def test_safetensors_files(tmp_path):
    tensors = {
        "model.fc.weight": (8, 4),
        "model.fc.bias": (8,),
        "model.fc.inner.weight": (2, 6),
        "norm.weight": (4,),
        "conv.weight": (2, 3, 3, 3),
        "embed_tokens.weight": (100, 4),
        "wte.weight": (100, 4),
    }
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, path)
    assert sorted(found(str(path))) == [("model.fc", 8, 4, 1), ("model.fc.inner", 2, 6, 1)]
    safetensors.torch.save_file({"norm.weight": torch.zeros(4)}, tmp_path / "none.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 100)
    for name, says in (("none", "no 2-D tensor"), ("broken", "cannot read"), ("missing", "cannot read")):
        with pytest.raises(KronblocksError, match=says):
            linears(str(tmp_path / f"{name}.safetensors"))


@pytest.mark.parametrize(
    "text", ["", "64", "64x", "64x32x3", "64x32*", "-1x3", "a:b:c", "a b:c", "file.pt", 64, ["8x4", 3], [], None]
)
def test_what_cannot_be_read_says_what_can(text):
    with pytest.raises(KronblocksError, match=r"1024x1024 or 4096x1024\*12, package.module:function, or file.safetensors"):
        linears(text)


@pytest.mark.parametrize("text", ["0x4", "4x0", "4x4*0"])
def test_sizes_and_counts_begin_at_1(text):
    with pytest.raises(KronblocksError, match="from 1 on"):
        linears(text)
