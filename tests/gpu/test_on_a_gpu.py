"""The Triton kernels on a real GPU: `make test-gpu`. Elsewhere they are interpreted and compiled (tests/ops/test_triton*.py)."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from torch import Tensor, nn

from kronblocks import SparsityConfig, parameter_groups, sparsify_
from kronblocks.config.methods import METHODS
from kronblocks.ops import BlockIndex, backends, kron_linear, packed_linear

if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs an NVIDIA GPU: make test-gpu", allow_module_level=True)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [  # m1, n1, bm, bn, rank, groups, rows
    (128, 128, 8, 8, 1, 1, 2000),
    (32, 48, 16, 32, 4, 2, 333),
    (16, 16, 64, 64, 4, 1, 1000),
    (8, 4, 128, 128, 2, 1, 257),
    (20, 30, 12, 5, 3, 4, 65),
    (64, 64, 4, 4, 4, 64, 100),
]


@pytest.fixture(autouse=True)
def asked_for(monkeypatch):
    monkeypatch.setenv("KRONBLOCKS_TRITON", "1")
    backends.look_again()


def operands(case, dtype: torch.dtype) -> list[Tensor]:
    m1, n1, bm, bn, rank, groups, rows = case
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = ((rows, n1 * bn), (m1, n1, rank), (groups, rank, bm, bn), (m1 * bm,))
    return [torch.randn(shape, device="cuda", generator=generator).to(dtype).requires_grad_() for shape in shapes]


def agree(function, tensors: list[Tensor], dtype: torch.dtype) -> None:
    """Output and all gradients against float64, relative to the largest value."""
    y = function(*tensors)
    dy = torch.randn_like(y)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    wanted = function(*exact)
    found, expected = torch.autograd.grad(y, tensors, dy), torch.autograd.grad(wanted, exact, dy.double())
    for own, other in zip((y, *found), (wanted, *expected), strict=True):
        assert own.dtype == dtype
        terms = max(max(t.shape) for t in tensors)  # of the longest sum, whose roundings grow about as its root
        bound = max(8, terms**0.5) * torch.finfo(dtype).eps
        assert float((own.double() - other).abs().max()) <= bound * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize(
    ("plan", "masked"),
    [("packed", True), *itertools.product(("dense", "coeff_first", "tile_first"), (False, True))],
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_products_with_factors(case, dtype, plan, masked):
    assert backends.expected("cuda", dtype).name == "triton"
    live = torch.rand(case[:2], device="cuda", generator=torch.Generator("cuda").manual_seed(1)) < 0.2 if masked else None
    agree(lambda x, c, t, b: kron_linear(x, c, t, b, plan=plan, live=live), operands(case, dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [(16, 16), (64, 64), (128, 128), (24, 48), (4, 4)], ids=str)
def test_packed_products(block, dtype):
    mask = torch.rand(24, 20, device="cuda") < 0.1
    mask[0, 0] = True
    index = BlockIndex.from_mask(mask)
    x = torch.randn(500, 20 * block[1], device="cuda").to(dtype).requires_grad_()
    values = torch.randn(int(mask.sum()), *block, device="cuda").to(dtype).requires_grad_()
    bias = torch.randn(24 * block[0], device="cuda").to(dtype).requires_grad_()
    agree(lambda x, values, bias: packed_linear(x, values, index, bias), [x, values, bias], dtype)


@pytest.mark.parametrize("plan", ["coeff_first", "tile_first"])
def test_the_same_bits_at_every_run_in_a_cuda_graph_and_compiled(plan):
    tensors = operands(SHAPES[0], torch.bfloat16)
    dy = torch.randn(SHAPES[0][-1], 1024, device="cuda", dtype=torch.bfloat16)

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(kron_linear(*tensors, plan=plan), tensors, dy)

    first = step()
    assert all(torch.equal(a, b) for a, b in zip(first, step(), strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(first, captured, strict=True))
    compiled = torch.compile(lambda x, c, t, b: kron_linear(x, c, t, b, plan=plan), fullgraph=True)
    assert torch.equal(compiled(*tensors), kron_linear(*tensors, plan=plan))


def test_tuning_finds_the_same_product(monkeypatch, tmp_path):
    monkeypatch.setenv("KRONBLOCKS_TUNE", "1")
    monkeypatch.setenv("KRONBLOCKS_CACHE", str(tmp_path))
    agree(lambda x, c, t, b: kron_linear(x, c, t, b, plan="coeff_first"), operands(SHAPES[2], torch.float32), torch.float32)
    assert list((tmp_path / "sizes").iterdir())


def test_no_intermediate_in_memory():
    """A step of a factored plan allocates less than its intermediate would take."""
    tensors = operands((16, 16, 64, 64, 4, 1, 20_000), torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    with torch.no_grad():
        kron_linear(*tensors, plan="coeff_first")
    assert torch.cuda.max_memory_allocated() - before < 1.5 * 20_000 * 1024 * 2


@pytest.mark.parametrize("method", [method for method in METHODS if method != "dense"])
def test_a_model_that_moves_after_sparsify_trains(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    sparsifier = sparsify_(model, SparsityConfig(method=method, block_size=16, target_sparsity=0.5))
    model.cuda()
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3))
    sparsifier.attach(optimizer, total_steps=20)
    for _ in range(20):
        x = torch.randn(32, 64, device="cuda")
        loss = (model(x) - x).square().mean() + sparsifier.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert sparsifier.sparsity >= 0.5
