"""The Triton kernels in Triton's interpreter, on a CPU, against float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from kronblocks.core import KronblocksError
from kronblocks.ops import BlockIndex, backends
from kronblocks.ops.backends import torch as plain
from kronblocks.ops.backends import triton as backend
from kronblocks.ops.backends.triton import packed, tuning
from kronblocks.ops.backends.triton import sizes as suited
from kronblocks.ops.plans import PLANS

pytestmark = [pytest.mark.slow, pytest.mark.needs("triton")]

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


def assert_close(actual: torch.Tensor, expected: torch.Tensor, size: torch.Tensor, terms: int, rounded: int = 0) -> None:
    """Within the rounding of a float32 (or float64) sum of so many products that add up to `size`, rounded once to the dtype.

    So many intermediates of the sum are rounded to the dtype too.
    """
    sums, own = (torch.finfo(dtype).eps for dtype in (torch.promote_types(actual.dtype, torch.float32), actual.dtype))
    bound = ((terms + 8) * sums + rounded * own) * size + own * expected.abs()
    assert ((actual.double() - expected).abs() <= bound).all(), (actual.double() - expected).abs().max()


def both(function, *tensors):
    """A multilinear formula in float64, and on absolute values."""
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
    monkeypatch.setattr(packed, "_SPLIT_ROWS", 32)
    index = BlockIndex.from_mask(torch.tensor([[True, False], [True, True]]))
    for rows in (31, 64, 97, 200):
        x, dy = torch.randn(rows, 32), torch.randn(rows, 48)
        expected = plain.packed_grad_values(dy.double(), x.double(), index)
        size = plain.packed_grad_values(dy.double().abs(), x.double().abs(), index)
        assert_close(backend.packed_grad_values(dy, x, index), expected, size, rows)


@pytest.mark.parametrize(("rank", "groups"), [(1, 1), (1, 4), (3, 1), (3, 2), (17, 2)])
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


FACTORS = [  # m1, n1, bm, bn, rank, groups, rows, share of live blocks or None
    (3, 2, 16, 16, 1, 1, 5, None),
    (4, 5, 8, 8, 2, 1, 17, None),
    (4, 5, 8, 16, 2, 2, 9, 0.4),
    (4, 3, 3, 5, 3, 4, 6, 0.5),
    (20, 3, 4, 20, 2, 1, 10, 0.3),
    (5, 4, 20, 3, 1, 5, 7, None),
    (70, 35, 2, 2, 1, 1, 9, 0.2),
    (6, 18, 32, 8, 2, 3, 20, 0.0),
    (2, 2, 8, 8, 2, 1, 0, 0.5),
    (5, 20, 8, 8, 3, 1, 40, 0.5),
    (18, 3, 16, 16, 5, 1, 33, None),
    (4, 6, 16, 16, 6, 2, 18, 0.4),
    (3, 4, 64, 1, 2, 1, 6, None),  # tiles that no chip holds side by side
    (2, 3, 4, 64, 3, 1, 20, None),
]


@pytest.mark.parametrize("plan", ["coeff_first", "tile_first", "dense"])
@pytest.mark.parametrize("case", FACTORS, ids=str)
def test_products_with_factors(case, plan, monkeypatch):  # float64 in every second case, float16 in the others
    """Fused: the intermediate is rounded to the dtype once, and sums over rows are split."""
    monkeypatch.setattr(suited, "ENOUGH", 4)  # programs: a few large ones, which an interpreter prefers
    m1, n1, bm, bn, rank, groups, rows, share = case
    torch.manual_seed(0)
    live = None if share is None else torch.rand(m1, n1) < share
    for dtype in (torch.float32, (torch.float64, torch.float16)[FACTORS.index(case) % 2]):
        x, dy, bias = torch.randn(rows, n1 * bn).to(dtype), torch.randn(rows, m1 * bm).to(dtype), torch.randn(m1 * bm).to(dtype)
        coeff, tiles = torch.randn(m1, n1, rank).to(dtype), torch.randn(groups, rank, bm, bn).to(dtype)
        size = max(m1 * bm, n1 * bn, rows) * rank
        y = backend.kron_linear(x, coeff, tiles, bias, live, PLANS[plan])
        exact, magnitude = both(lambda x, c, t, b: plain.kron_linear(x, c, t, b, live, PLANS[plan]), x, coeff, tiles, bias)
        assert_close(y, exact, magnitude, size, rounded=1)
        exact, magnitude = both(
            lambda dy, x, c, t: plain.kron_backward(dy, x, c, t, live, PLANS[plan], True), dy, x, coeff, tiles
        )
        for input_grad in (True, False) if dtype == torch.float32 else (True,):
            found = backend.kron_backward(dy, x, coeff, tiles, live, PLANS[plan], input_grad)
            assert (found[0] is not None) == input_grad
            for own, other, scale in zip(found, exact, magnitude, strict=True):
                if own is not None:
                    assert own.dtype == dtype
                    assert_close(own, other, scale, size, rounded=1)
            assert live is None or not found[1][~live].any()


def test_products_with_factors_are_the_same_whatever_the_sizes(monkeypatch):
    """Tuning tries a launch with each of its sizes: all give the product."""
    x, dy, coeff, tiles = torch.randn(12, 60), torch.randn(12, 32), torch.randn(4, 10, 5), torch.randn(1, 5, 8, 6)
    monkeypatch.setattr(suited, "ENOUGH", 4)
    tried: dict[str, int] = {}

    def every(kernel, about, x, default, others, run):
        possible = [default, *others]
        assert len(possible) == len(set(possible)) >= 6
        results = [run(sizes) for sizes in possible[(len(tried) + rank) % 2 :: 2]]
        tried[kernel] = len(possible)
        for result in results:
            torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-4)
        return results[-1]

    monkeypatch.setattr(tuning, "wanted", lambda device: True)
    monkeypatch.setattr(tuning, "tuned", every)
    for rank, plan, transposed in itertools.product((5, 2), ("coeff_first", "tile_first"), (False, True)):
        factors = coeff[..., :rank], tiles[:, :rank]
        given, other = (x, dy) if not transposed else (dy, x)
        factors = factors if not transposed else (factors[0].transpose(0, 1), factors[1].transpose(2, 3))
        exact = plain.kron_linear(*(t.double() for t in (given, *factors)), None, None, PLANS[plan])
        torch.testing.assert_close(
            backend.kron_linear(given, *factors, None, None, PLANS[plan]).double(), exact, rtol=1e-5, atol=1e-4
        )
        gradients = plain.kron_backward(*(t.double() for t in (other, given, *factors)), None, PLANS[plan], True)
        for own, wanted in zip(backend.kron_backward(other, given, *factors, None, PLANS[plan], True), gradients, strict=True):
            assert own is not None and wanted is not None
            torch.testing.assert_close(own.double(), wanted, rtol=1e-5, atol=1e-4)
    assert tried.keys() == {
        "mix_then_tile", "mix_then_tile, both", "mix_then_tile, gradient", "tile_then_mix", "mix_gradient",
    }  # fmt: skip


def test_packed_products_are_the_same_whatever_the_sizes(monkeypatch):
    """Tuning tries the launch with each of its sizes: all give the product, one of them is returned."""
    mask = torch.zeros(8, 9, dtype=torch.bool)  # a long block row, a long block column, and all others nearly empty
    mask[1], mask[:, 4], mask[3] = True, True, False
    index, values = index_of(mask, 1), torch.randn(int(mask.sum()) + 1, 16, 32)
    x, dy, bias = torch.randn(140, 9 * 32), torch.randn(140, 8 * 16), torch.randn(128)
    tried: list[tuple[str, tuning.Sizes]] = []

    def every(kernel, about, x, default, others, run):
        assert x.shape[0] == 140 and about["capacity"] == len(index.slot)
        possible = [default, *others]
        assert len(possible) == len(set(possible)) >= 11
        tested = [possible[0], *possible[2::3], *(sizes for sizes in possible if sizes.terms != default.terms)]
        results = [run(sizes) for sizes in tested]
        tried.extend((kernel, sizes) for sizes in tested)
        for result in results:
            torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-4)
        return results[-1]

    monkeypatch.setattr(tuning, "wanted", lambda device: True)
    monkeypatch.setattr(tuning, "tuned", every)
    monkeypatch.setattr(packed, "_BLOCK_ROWS", 2)
    products = (
        (backend.packed_linear(x, values, index, bias), plain.packed_linear(x, values, index, bias)),
        (backend.packed_grad_input(dy, values, index), plain.packed_grad_input(dy, values, index)),
        (backend.packed_grad_values(dy, x, index), plain.packed_grad_values(dy, x, index)),
    )
    cut = {kernel for kernel, sizes in tried if 0 < sizes.terms < 8}  # pieces of the long ones
    assert cut == {kernel for kernel, _ in tried} == {"product", "product, transposed", "grad_values"}
    for own, other in products:
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("rows", "columns", "height", "itemsize", "step", "warps"),
    [
        (20_000, 64, 64, 2, 256, 8),
        (2_000, 64, 64, 2, 128, 4),
        (20_000, 64, 128, 2, 128, 8),
        (20_000, 64, 64, 4, 64, 4),
        (256, 64, 64, 2, 32, 4),
    ],
)
def test_how_many_rows_a_program_multiplies(rows, columns, height, itemsize, step, warps):
    sizes = packed._product_sizes(rows, columns, height, 64, itemsize)
    assert (sizes.rows, sizes.warps) == (step, warps)


def test_the_quickest_sizes_are_kept(monkeypatch, tmp_path):
    from triton.runtime.errors import OutOfResources

    monkeypatch.setenv("KRONBLOCKS_CACHE", str(tmp_path))
    seconds = {1: 3.0, 2: 1.0, 4: 2.0}
    default, *others = (tuning.Sizes(16, rows, 16, 4, 2) for rows in (1, 2, 4, 8))
    ran: list[tuning.Sizes] = []

    def run(sizes: tuning.Sizes) -> int:
        ran.append(sizes)
        if sizes.rows == 8:
            raise OutOfResources(524_288, 232_448, "shared memory")
        return sizes.rows

    monkeypatch.setattr(tuning, "_seconds", lambda call: seconds[call()])
    for known in (False, True):
        tuning.forget()
        ran.clear()
        assert tuning.tuned("kernel", {"rank": 1}, torch.empty(100, 1), default, others, run) == 2
        assert len(ran) == (1 if known else 5)
        more = torch.empty(128, 1)
        assert tuning.tuned("kernel", {"rank": 1}, more, default, others, run) == 2, "rows up to a power of two are one"
    file = next((tmp_path / "sizes").iterdir())
    file.write_text(file.read_text().replace('"rows": 2', '"rows": 1048576'))
    tuning.forget()
    x = torch.empty(100, 1)
    assert tuning.tuned("kernel", {"rank": 1}, x, default, others, run) == 2, "sizes that are none of the possible ones"
    monkeypatch.setattr(tuning, "_recording", lambda: True)
    tuning.forget()
    assert tuning.tuned("kernel", {"rank": 1}, x, default, others, run) == 2, "what is known is used in a CUDA graph"
    ran.clear()
    assert tuning.tuned("kernel", {"rank": 9}, x, default, others, run) == 1 and len(ran) == 1, "and nothing is tried"
    tuning.forget()


def test_a_launch_that_does_not_fit_takes_less_at_a_time():
    from triton.runtime.errors import OutOfResources

    ran: list[tuple[int, int, int]] = []

    def run(sizes: tuning.Sizes) -> tuple[int, int, int]:
        taken = sizes.outputs, sizes.sources, sizes.stages
        ran.append(taken)
        if math.prod(taken) > room:
            raise OutOfResources(131_072, 101_376, "shared memory")
        return taken

    sizes = tuning.Sizes(32, 8, 64, 4, 3)
    room = 32 * 64 * 2
    assert tuning.within_resources("kernel", sizes, run) == (32, 64, 2)
    assert tuning.within_resources("kernel", sizes, run) == (32, 64, 2)
    assert ran == [(32, 64, 3), (32, 64, 2), (32, 64, 2)], "what fitted is remembered"
    room = 32 * 32
    assert tuning.within_resources("another", sizes, run) == (32, 32, 1)
    room = 16 * 16
    assert tuning.within_resources("a third", sizes, run) == (16, 16, 1)
    room = 16 * 15
    with pytest.raises(OutOfResources):
        tuning.within_resources("a fourth", sizes, run)
    tuning.forget()


def test_float32_in_parts_is_not_biased():
    """Parts that were cut off, not rounded, would lose 1e-7 of every positive product."""
    x, values = torch.rand(64, 64) + 1, torch.rand(4, 32, 32) + 1
    index = BlockIndex.from_mask(torch.ones(2, 2, dtype=torch.bool))
    exact = plain.packed_linear(x.double(), values.double(), index)
    error = (backend.packed_linear(x, values, index).double() - exact) / exact
    assert error.mean().abs() < 2e-8 and error.abs().max() < 5e-7


def test_a_bias_that_is_not_contiguous():
    mask = torch.ones(2, 2, dtype=torch.bool)
    x, values, bias = torch.randn(5, 32), torch.randn(4, 16, 16), torch.randn(64)[::2]
    index = BlockIndex.from_mask(mask)
    wanted = backend.packed_linear(x, values, index, bias.clone())
    assert torch.equal(backend.packed_linear(x, values, index, bias), wanted)
    coeff, tiles = torch.randn(2, 2, 1), torch.randn(1, 1, 16, 16)
    for plan in ("coeff_first", "tile_first"):
        wanted = backend.kron_linear(x, coeff, tiles, bias.clone(), None, PLANS[plan])
        assert torch.equal(backend.kron_linear(x, coeff, tiles, bias, None, PLANS[plan]), wanted)


@pytest.fixture
def looking_again():
    """What the test sets is found, and forgotten behind it."""
    backends.look_again()
    yield
    backends.look_again()


def test_they_serve_a_gpu_unless_they_are_switched_off(looking_again, monkeypatch):
    monkeypatch.delenv("KRONBLOCKS_TRITON", raising=False)
    names = [backends.expected("cuda:1", dtype).name for dtype in (*backend.DTYPES, torch.float64)]
    assert names == [*["triton"] * 3, "torch"]
    assert backends.expected("cpu", torch.bfloat16).name != "triton"
    assert backends.backend_key("cuda", torch.float32).startswith("triton 3")
    monkeypatch.setenv("KRONBLOCKS_TRITON", "0")
    assert backends.expected("cuda", torch.float32).name == "triton", "who serves is found once"
    backends.look_again()
    assert backends.expected("cuda", torch.float32) is plain
    monkeypatch.setenv("KRONBLOCKS_TRITON", "1")
    backends.look_again()
    assert backends.backend_key("cuda", torch.float32).endswith("unchecked")
    monkeypatch.setenv("KRONBLOCKS_TRITON", "yes")
    backends.look_again()
    with pytest.raises(KronblocksError, match="'yes': write 0"):
        backends.expected("cuda", torch.float32)
