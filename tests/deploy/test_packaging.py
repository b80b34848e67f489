"""A package computes what the model computes, for other sizes too, and what cannot be packaged is said."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

from kronblocks import BlockSparseLinear, KronblocksError, export
from kronblocks.deploy.packaging import package

QUICKLY = {"aot_inductor.compile_wrapper_opt_level": "O0"}


def sparse() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(BlockSparseLinear(64, 128, 16, mask=torch.rand(8, 4) < 0.4))
    return model.eval().requires_grad_(False)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_it_computes_without_the_models_code(tmp_path):
    model, x = sparse(), torch.randn(4, 64)
    exported = export(model, x, form="packed", slim=False)
    path = exported.package(tmp_path / "new" / "model.pt2", options=QUICKLY)
    loaded = torch._inductor.aoti_load_package(str(path))
    for rows in (1, 4, 9):
        x = torch.randn(rows, 64)
        assert (loaded(x) - model(x)).abs().max() <= 1e-5 * model(x).abs().max()


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = sparse()

    def forward(self, x):
        return self.net(x) if float(x.sum()) > 0 else x


def test_what_cannot_be_packaged_is_said(tmp_path):
    x = torch.ones(4, 64)
    with pytest.raises(KronblocksError, match=r"ends with .pt2, not 'model.bin': write model.pt2"):
        package(sparse(), tmp_path / "model.bin", x)
    with pytest.raises(KronblocksError, match=r"cannot trace the model: .* Let forward decide nothing by the numbers"):
        package(Branching(), tmp_path / "model.pt2", x)
    functions = {"generate": lambda model: model(x)}
    with pytest.raises(KronblocksError, match="needs an input of the model, not a function"):
        export(sparse(), phases=functions, form="packed").package(tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())
