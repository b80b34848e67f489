"""What serves a real GPU by default: kernels that agree with float64 there; and PyTorch's operators, which wait for nothing."""

from __future__ import annotations

import os
import warnings

import pytest
import torch

from kronblocks import BlockSparseLinear, KroneckerBlockLinear
from kronblocks.advice import doctor
from kronblocks.core import PerformanceWarning
from kronblocks.ops import BlockIndex, backends, kron_linear, packed_linear
from kronblocks.ops.backends import torch as plain
from kronblocks.ops.backends.triton import packed, trust
from kronblocks_lab.bench import short
from kronblocks_lab.bench.measure.graphs import graphed

if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs an NVIDIA GPU: make test-gpu", allow_module_level=True)

MASK = torch.tensor([[True, False, True], [False, False, False], [True, True, False], [False, True, True]])


@pytest.fixture(autouse=True)
def by_default(monkeypatch, tmp_path):
    monkeypatch.delenv("KRONBLOCKS_TRITON", raising=False)
    monkeypatch.setenv("KRONBLOCKS_CACHE", str(tmp_path))
    backends.look_again()
    trust.forget()
    yield
    trust.forget()
    backends.look_again()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block", [(8, 8), (16, 32), (64, 64)], ids=str)
def test_every_kernel_agrees_and_serves(block, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for plan in ("dense", "coeff_first", "tile_first", "packed"):
            layer = KroneckerBlockLinear(3 * block[1], 4 * block[0], block, rank=2, plan=plan).cuda().to(dtype)
            layer.set_block_mask_(MASK.cuda())
            layer(torch.randn(40, 3 * block[1], device="cuda", dtype=dtype, requires_grad=True)).sum().backward()
    verdicts = trust.known()
    assert len(verdicts) >= 6 and not any(verdicts.values()), verdicts


def test_a_wrong_kernel_is_refused_and_all_is_right(monkeypatch):
    launch = packed.launch

    def wrong(kernel, programs, *arguments, **settings):
        launch(kernel, programs, *arguments, **settings)
        if kernel.__name__ == "product" and arguments[3].numel():
            arguments[3].view(-1)[:16] += 0.5

    monkeypatch.setattr(packed, "launch", wrong)
    index = BlockIndex.from_mask(MASK.cuda())
    x, values = torch.randn(40, 96, device="cuda"), torch.randn(7, 32, 32, device="cuda")
    with pytest.warns(PerformanceWarning, match="'product' for float32 blocks of 32x32 is refused on NVIDIA"):
        y = packed_linear(x, values, index)
    exact = plain.packed_linear(x.double(), values.double(), index)
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("plan", ["dense", "coeff_first", "tile_first", "packed"])
def test_pytorchs_operators_wait_for_nothing(plan, monkeypatch):
    monkeypatch.setenv("KRONBLOCKS_TRITON", "0")
    backends.look_again()
    live = BlockIndex.from_mask(MASK.cuda()) if plan == "packed" else MASK.cuda()
    tensors = [torch.randn(s, device="cuda", requires_grad=True) for s in ((40, 96), (4, 3, 2), (2, 2, 16, 32), (64,))]
    dy = torch.randn(40, 64, device="cuda")

    def step() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(kron_linear(*tensors, plan=plan, live=live), tensors, dy)

    first = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    replay = graphed(step)
    for own, other in zip(replay(), first, strict=True):
        torch.testing.assert_close(own, other)


def test_values_train_in_a_graph_without_triton(monkeypatch):
    monkeypatch.setenv("KRONBLOCKS_TRITON", "0")
    backends.look_again()
    layer = BlockSparseLinear(96, 64, (16, 32), mask=MASK, plan="packed").cuda()
    x, dy = torch.randn(40, 96, device="cuda"), torch.randn(40, 64, device="cuda")
    replay = graphed(lambda: torch.autograd.grad(layer(x), list(layer.parameters()), dy))
    dense = torch.nn.functional.linear(x.double(), layer.dense_weight().double(), layer.bias.double())
    torch.testing.assert_close(layer(x).double(), dense, rtol=1e-4, atol=1e-4)
    assert all(gradient.isfinite().all() for gradient in replay())


def test_the_doctor_finds_that_everything_works():
    findings = doctor.examine()
    assert doctor.works(findings), [each for each in findings if each.state == "fails"]


def test_the_short_benchmark_with_quick_sizes(monkeypatch, tmp_path):
    monkeypatch.setattr(short, "run_tests", lambda folder, seconds: {"status": 0, "said": []})  # these very tests
    found = short.run(short.ShortSettings(device="cuda", quick=True, seconds=1e-3, repeats=2, out=tmp_path))
    assert found.head["failed"] == {} and {row["part"] for row in found.rows} == set(short.parts(short.TINY))
