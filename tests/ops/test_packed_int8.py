"""Products with int8 values: the same integers as in int64, on every instruction set and without the kernels."""

import contextlib

import pytest
import torch
from tests.ops.test_native import AVX512, BLOCKS, needs_cpu, use

from kronblocks.core.errors import KronblocksError
from kronblocks.ops import BlockIndex, packed_linear_int8
from kronblocks.ops.backends import library
from kronblocks.ops.packed_int8 import quantized_blocks, quantized_rows

SETS = (
    "python",
    "baseline",
    needs_cpu("avx2", "avx2", "fma3"),
    needs_cpu("avx512", *AVX512),
    needs_cpu("avx512vnni", *AVX512, "avx512_vnni"),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(params=SETS)
def kernels(request):
    """Each instruction set, and the formula that computes where there is no kernel."""
    if request.param == "python":
        loaded = library.load()
        with loaded.aside() if loaded else contextlib.nullcontext():
            yield
    elif reason := library.unavailable_reason():
        pytest.skip(f"no native kernels: {reason}")
    else:
        yield from use(request.param)


def operands(block, mask, rows, dtype, *, full=False):
    """x, values, scales, bias, an index whose slots are in another order, and W as integers."""
    (m1, n1), (bm, bn) = mask.shape, block
    index = BlockIndex.from_mask(mask, torch.randperm(mask.numel()))
    values = torch.randint(-127, 128, (mask.numel(), bm, bn), dtype=torch.int8)
    if full:
        values = torch.where(values < 0, -127, 127).to(torch.int8)
    weight = torch.zeros(m1, n1, bm, bn, dtype=torch.int64)
    live = int(index.crow[-1])
    weight[index.row[:live].long(), index.col[:live].long()] = values[index.slot[:live].long()].long()
    x, scales, bias = torch.randn(rows, n1 * bn).to(dtype), torch.rand(m1 * bm), torch.randn(m1 * bm)
    return x, values, scales, bias, index, weight.transpose(1, 2).reshape(m1 * bm, n1 * bn)


def check(x, values, scales, bias, index, weight):
    """Equal integers, so that only the three roundings behind them, and that of the result, differ."""
    y = packed_linear_int8(x, values, scales, index, bias)
    assert y.dtype is x.dtype and y.shape == (*x.shape[:-1], len(weight))
    whole, factors = quantized_rows(x)
    product = (whole.long() @ weight.T).double() * scales.double() * factors.double()
    exact = product if bias is None else product + bias.double()
    bound = 4 * 2.0**-24 * (product.abs() + exact.abs()) + torch.finfo(x.dtype).eps / 2 * exact.abs()
    assert ((y.double() - exact).abs() <= bound).all(), (y.double() - exact).abs().max()


def test_the_same_integers(kernels):
    for number, block in enumerate((*BLOCKS[:-1], (24, 24), (2, 128), (64, 64))):
        for rows in (0, 1, (2, 3, 4)[number % 3], (5, 16, 17)[number % 3], 50 + number):
            mask = torch.rand((3, 5), generator=torch.Generator().manual_seed(number)) < 0.5
            mask[1] = False
            dtype = DTYPES[(number + rows) % 2 if rows > 4 else (number + rows) % 4]
            x, values, scales, bias, index, weight = operands(block, mask, rows, dtype)
            check(x, values, scales, bias if rows % 3 else None, index, weight)


def test_largest_numbers_neither_saturate_nor_overflow(kernels):
    for rows in (1, 7):
        x, values, scales, _, index, weight = operands((2, 1024), torch.ones(1, 128).bool(), rows, torch.float32, full=True)
        signs = weight[:1].sign().float()
        x = torch.cat([signs, -signs, x])[:rows]
        check(x, values, scales, None, index, weight)
        assert int(quantized_rows(x)[0][0].long() @ weight[0]) == 127 * 127 * 2**17


def test_rows_of_zeros_and_of_what_is_not_finite(kernels):
    for rows in (4, 9):
        x, values, scales, bias, index, _ = operands((3, 4), torch.eye(2, 3).bool(), rows, torch.float32)
        x[0], x[1, 2], x[2, 3] = 0, float("inf"), float("nan")
        x[3] = 1e-38
        y = packed_linear_int8(x, values, scales, index, bias)
        assert torch.equal(y[0], bias) and torch.equal(y[3], bias)
        assert y[1:3].isnan().all() and y[4:].isfinite().all()


def test_work_memory_holds_anything_at_first(kernels):
    """What other calls left in it must not be read."""
    big = operands((7, 9), torch.ones(9, 9).bool(), 60, torch.float32, full=True)
    packed_linear_int8(big[0] * float("inf"), big[1], big[2], big[4])
    for rows in (1, 5):
        check(*operands((3, 5), torch.tensor([[True, False, True], [False] * 3]), rows, torch.float32))


@pytest.mark.needs("native")
def test_threads_and_strides():
    before = torch.get_num_threads()
    x, values, scales, bias, index, weight = operands((16, 16), torch.rand(20, 20) < 0.5, 70, torch.float32)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for rows in (1, 4, 16, 70):
                check(x[:rows], values, scales, bias, index, weight)
    finally:
        torch.set_num_threads(before)
    check(x.t().contiguous().t(), values.transpose(1, 2).contiguous().transpose(1, 2), scales, bias, index, weight)
    y = packed_linear_int8(x.view(7, 10, -1), values, scales, index)
    assert torch.equal(y.view(70, -1), packed_linear_int8(x, values, scales, index))


def test_quantized_blocks():
    values = torch.randn(4, 2, 3)
    values[0, 0] = 0
    values[1, 0] = 0
    row = torch.tensor([0, 0, 2, 2], dtype=torch.int32)
    whole, scales = quantized_blocks(values, row, 3)
    assert whole.dtype is torch.int8 and scales.shape == (6,) and (scales[[0, 2, 3]] == 0).all()
    assert whole.abs().amax() == 127 and (whole[:2, 0] == 0).all()
    error = (whole * scales.view(3, 2, 1)[row.long()] - values).abs()
    assert (error <= scales.view(3, 2, 1)[row.long()] / 2 * (1 + 1e-6)).all()
    assert quantized_blocks(values[:0], row[:0], 3)[1].tolist() == [0] * 6


def test_traced():
    x, values, scales, bias, index, _ = operands((4, 4), torch.rand(3, 4) < 0.6, 5, torch.float32)
    torch.library.opcheck(torch.ops.kronblocks.packed_linear_int8, (x, values, scales, bias, *index))

    def function(x):
        return packed_linear_int8(x, values, scales, index, bias)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), function(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert function(x).dtype is torch.bfloat16


def test_no_gradient_and_what_does_not_fit():
    x, values, scales, bias, index, _ = operands((4, 4), torch.ones(2, 3).bool(), 5, torch.float32)
    with pytest.raises(KronblocksError, match="no gradient"):
        packed_linear_int8(x.requires_grad_(), values, scales, index, bias).sum().backward()
    x = x.detach()
    with pytest.raises(KronblocksError, match=r"must be int8 .* not torch.float32"):
        packed_linear_int8(x, values.float(), scales, index)
    with pytest.raises(KronblocksError, match=r"scales must be float32 \(8,\)"):
        packed_linear_int8(x, values, scales[:7], index)
    with pytest.raises(KronblocksError, match="x has 11 features"):
        packed_linear_int8(x[:, :11], values, scales, index)
    with pytest.raises(KronblocksError, match="x must be floating point"):
        packed_linear_int8(x.int(), values, scales, index)
    with pytest.raises(KronblocksError, match=r"bias must be \(8,\)"):
        packed_linear_int8(x, values, scales, index, bias[:3])
    wide = BlockIndex.from_mask(torch.ones(1, 129).bool())
    with pytest.raises(KronblocksError, match="at most 131,072 inputs"):
        packed_linear_int8(torch.ones(1, 129 * 1024), torch.ones(129, 1, 1024, dtype=torch.int8), torch.ones(1), wide)
