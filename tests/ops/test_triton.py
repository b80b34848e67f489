"""The Triton kernels: in Triton's interpreter on a CPU against float64, and compiled for a GPU that need not be there."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from kronblocks import BlockIndex
from kronblocks.ops import backends
from kronblocks.ops.backends import torch as plain
from kronblocks.ops.backends import triton as backend

DTYPES = (torch.float64, torch.float32, torch.float16)  # the interpreter multiplies the bits of bfloat16
BLOCKS = ((16, 16), (16, 32), (32, 16), (20, 24), (48, 16), (128, 64), (4, 4), (3, 5), (8, 160))
ROWS = (0, 1, 5, 33, 70)


def cases():
    generator = torch.Generator().manual_seed(0)
    for number, (block, dtype) in enumerate(itertools.product(BLOCKS, DTYPES)):
        grid, rows = ((3, 2), (1, 1), (2, 4), (5, 3))[number % 4], ROWS[number % len(ROWS)]
        mask = torch.rand(grid, generator=generator) < (0.3, 0.6, 1.0, 0.0)[number % 7 % 4]
        yield block, dtype, grid, rows, mask


def index_of(mask: torch.Tensor, spare: int) -> BlockIndex:
    """An index with dead slots, in an order of its own."""
    live = mask.flatten().nonzero().squeeze(1)
    dead = (~mask).flatten().nonzero().squeeze(1)[:spare]
    position = torch.cat([live, dead])
    return BlockIndex.from_mask(mask, position[torch.randperm(len(position))])


def assert_close(actual: torch.Tensor, expected: torch.Tensor, size: torch.Tensor, terms: int) -> None:
    """Within the rounding of a float32 (or float64) sum of so many products that add up to `size`, rounded once to the dtype."""
    sums = torch.promote_types(actual.dtype, torch.float32)
    bound = (terms + 8) * torch.finfo(sums).eps * size + torch.finfo(actual.dtype).eps * expected.abs()
    assert ((actual.double() - expected).abs() <= bound).all(), (actual.double() - expected).abs().max()


def both(function, *tensors):
    """A bilinear formula in float64, and on absolute values."""
    return function(*(t.double() for t in tensors)), function(*(t.double().abs() for t in tensors))


def test_packed_products():
    for (bm, bn), dtype, (m1, n1), rows, mask in cases():
        index = index_of(mask, 3)
        x, dy = torch.randn(rows, n1 * bn).to(dtype), torch.randn(rows, m1 * bm).to(dtype)
        values, bias = torch.randn(len(index.slot), bm, bn).to(dtype), torch.randn(m1 * bm).to(dtype)

        def weight(values, index=index, shape=(m1, n1, bm, bn)):
            blocks = values.new_zeros(shape)
            entries = int(index.crow[-1])
            blocks[index.row[:entries].long(), index.col[:entries].long()] = values[index.slot[:entries].long()]
            return blocks.transpose(1, 2).reshape(shape[0] * shape[2], shape[1] * shape[3])

        assert_close(
            backend.packed_linear(x, values, index, bias),
            *both(lambda x, v, b: x @ weight(v).t() + b, x, values, bias),
            terms=n1 * bn + 1,
        )
        assert_close(backend.packed_grad_input(dy, values, index), *both(lambda dy, v: dy @ weight(v), dy, values), m1 * bm)

        def live_blocks_of(dy, x, index=index, shape=(m1, bm, n1, bn)):
            blocks = (dy.t() @ x).view(shape).transpose(1, 2)
            out = blocks.new_zeros(len(index.slot), shape[1], shape[3])
            entries = int(index.crow[-1])
            out[index.slot[:entries].long()] = blocks[index.row[:entries].long(), index.col[:entries].long()]
            return out

        assert_close(backend.packed_grad_values(dy, x, index), *both(live_blocks_of, dy, x), max(rows, 1))


def test_sums_over_many_rows_are_split(monkeypatch):
    monkeypatch.setattr(backend, "_SPLIT_ROWS", 32)
    index = BlockIndex.from_mask(torch.tensor([[True, False], [True, True]]))
    for rows in (31, 64, 97, 200):
        x, dy = torch.randn(rows, 32), torch.randn(rows, 48)
        expected = plain.packed_grad_values(dy.double(), x.double(), index)
        size = plain.packed_grad_values(dy.double().abs(), x.double().abs(), index)
        assert_close(backend.packed_grad_values(dy, x, index), expected, size, rows)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("rank", [1, 3, 17])
def test_live_blocks_and_their_gradient(rank, groups):
    for (bm, bn), dtype in itertools.product(((16, 16), (20, 24), (4, 4), (3, 5)), DTYPES):
        mask = torch.rand(4, 5) < 0.6
        index = index_of(mask, 2)
        coeff, tiles = torch.randn(4, 5, rank).to(dtype), torch.randn(groups, rank, bm, bn).to(dtype)
        values = backend.live_blocks(coeff, tiles, index)
        entries = int(index.crow[-1])
        assert not values[entries:].any()
        expected, size = both(lambda c, t, i=index: plain.live_blocks(c, t, i), coeff, tiles)
        assert_close(values[:entries], expected[:entries], size[:entries], rank)
        dvalues = torch.randn(len(index.slot), bm, bn).to(dtype)
        dvalues[entries:] = 0
        found = backend.live_blocks_backward(dvalues, coeff, tiles, index)
        wanted, sizes = both(lambda d, c, t, i=index: plain.live_blocks_backward(d, c, t, i), dvalues, coeff, tiles)
        for own, other, size, terms in zip(found, wanted, sizes, (bm * bn, 20), strict=True):
            assert own.dtype == dtype
            assert_close(own, other, size, terms)
        assert not found[0][~mask].any()


COMPILE = """
import sys, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kronblocks import BlockIndex
from kronblocks.ops.backends import triton as backend, triton_kernels

NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32"}


class Compiled:
    def __init__(self, name):
        self.kernel = getattr(triton_kernels, name)

    def __getitem__(self, grid):
        assert all(isinstance(size, int) and size > 0 for size in grid), grid
        return self

    def __call__(self, *arguments, **settings):
        names = self.kernel.arg_names
        warps = settings.pop("num_warps", 4)
        given = {**dict(zip(names, arguments)), **settings}
        assert set(given) == set(names)
        signature = {
            name: f"*{NAMES[value.dtype]}" if isinstance(value, torch.Tensor)
            else "constexpr" if name in settings or value is None else "i32"
            for name, value in given.items()
        }
        constants = {name: given[name] for name, kind in signature.items() if kind == "constexpr"}
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options={"num_warps": warps})
        assert compiled.metadata.shared <= 99 * 1024, (self.kernel.__name__, constants, compiled.metadata.shared)
        print(self.kernel.__name__, constants["H"] if "H" in constants else "", compiled.metadata.shared)


class Kernels:
    def __getattr__(self, name):
        return Compiled(name)


backend._kernels = Kernels
for dtype in (torch.float32, torch.bfloat16, torch.float16)[: int(sys.argv[2])]:
    for bm, bn in ((16, 16), (64, 64), (128, 128), (24, 48), (4, 4)):
        index = BlockIndex.from_mask(torch.ones(2, 3, dtype=torch.bool))
        x, dy = torch.empty(4096, 3 * bn, dtype=dtype), torch.empty(4096, 2 * bm, dtype=dtype)
        values, coeff = torch.empty(6, bm, bn, dtype=dtype), torch.empty(2, 3, 4, dtype=dtype)
        tiles = torch.empty(2, 4, bm, bn, dtype=dtype)
        backend.packed_linear(x, values, index, torch.empty(2 * bm, dtype=dtype))
        backend.packed_grad_input(dy, values, index)
        backend.packed_grad_values(dy, x, index)
        backend.live_blocks(coeff, tiles, index)
        backend.live_blocks_backward(values, coeff, tiles, index)
"""


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_a_gpu(capability, tmp_path):
    """To machine code: a kernel that the interpreter runs may still be none that a GPU can."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", COMPILE, str(capability), "2"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {line.split()[0] for line in done.stdout.splitlines()} >= {"product", "grad_values", "scatter", "tiles_gradient"}


def test_they_serve_a_gpu_where_they_are_asked_for(monkeypatch):
    assert backends.name("cuda", torch.float32) == "torch"
    monkeypatch.setenv("KRONBLOCKS_TRITON", "1")
    assert [backends.name("cuda", dtype) for dtype in (*backend.DTYPES, torch.float64)] == [*["triton"] * 3, "torch"]
    assert backends.name("cpu", torch.bfloat16) == "torch"
    assert backends.backend_key("cuda", torch.float32).startswith("triton 3")
