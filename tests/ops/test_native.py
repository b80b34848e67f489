"""The native kernels on every instruction set this machine has: many shapes, threads and densities against float64."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from kronblocks.ops import BlockIndex, reference
from kronblocks.ops.backends import native
from kronblocks.ops.backends import torch as plain
from kronblocks.ops.convolution import ConvGeometry
from kronblocks.ops.plans import PLANS

pytestmark = pytest.mark.needs("native")
CAPABILITIES = torch.cpu.get_capabilities()


def needs_cpu(name: str, *capabilities: str):
    missing = not all(CAPABILITIES.get(capability) for capability in capabilities)
    return pytest.param(name, marks=pytest.mark.skipif(missing, reason=f"this CPU has not got {capabilities}"))


AVX512 = ("avx512_f", "avx512_dq", "avx512_vl", "avx512_bw")
INSTRUCTION_SETS = (
    "baseline",
    needs_cpu("avx2", "avx2", "fma3"),
    needs_cpu("avx512", *AVX512),
    needs_cpu("avx512bf16", *AVX512, "avx512_vnni", "avx512_bf16"),
)

BLOCKS = (
    (1, 1),
    (2, 2),
    (3, 5),
    (4, 4),
    (8, 8),
    (16, 16),
    (16, 4),
    (8, 32),
    (7, 9),
    (1, 16),
    (16, 1),
    (32, 32),
    (5, 40),
    (128, 128),
)
ROWS = (0, 1, 2, 3, 4, 5, 15, 17, 40, 130, 300)


def use(name: str):
    kernels = native.loaded_library()
    before = kernels.instruction_set()
    assert kernels.use_instruction_set(name), f"this build has no {name}"
    yield name
    kernels.use_instruction_set(before)


@pytest.fixture(params=INSTRUCTION_SETS[:-1])
def instruction_set(request):
    """Kernels for fp32 and fp64."""
    yield from use(request.param)


@pytest.fixture(params=INSTRUCTION_SETS)
def bf16_instruction_set(request):
    """Kernels for bf16: with AVX512-BF16 they are others than with AVX-512."""
    yield from use(request.param)


@pytest.fixture
def threads():
    """Set torch's number of threads for the length of a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def cases(seed: int, count: int, dtypes=(torch.float32, torch.float64)):
    """Random combinations, the same in every run; every block size and every number of rows comes up."""
    generator = torch.Generator().manual_seed(seed)

    def pick(choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    for number, block in zip(range(count), itertools.cycle(BLOCKS), strict=False):
        rows, grid = ROWS[number % len(ROWS)], pick(((3, 5), (1, 1), (6, 2), (9, 11)))
        dtype, density = pick(dtypes), pick((0.1, 0.4, 0.6, 1.0))
        mask = torch.rand(grid, generator=generator) < density
        yield block, rows, grid, dtype, mask, pick((1, 2, 3)), pick


def assert_close(actual: torch.Tensor, expected: torch.Tensor, size: torch.Tensor, terms: int, stages: int = 1) -> None:
    """Within the rounding of a sum of so many products whose absolute values add up to `size` (see tests/conftest.py).

    bf16 is summed in fp32 and rounded once, or once after each of the stages.
    """
    unit = torch.finfo(torch.promote_types(actual.dtype, torch.float32)).eps / 2
    bound = (terms + 8) * unit * size
    if actual.dtype is torch.bfloat16:
        bound += torch.finfo(actual.dtype).eps / 2 * (expected.abs() + bound + (stages - 1) * size)
    assert ((actual.double() - expected).abs() <= bound).all(), (actual.double() - expected).abs().max()


def both(function, *tensors):
    """A bilinear formula in float64, and on absolute values."""
    return function(*(t.double() for t in tensors)), function(*(t.double().abs() for t in tensors))


@pytest.mark.slow
def test_packed(instruction_set, threads):
    check_packed(threads, cases(0, 150))


@pytest.mark.slow
def test_packed_in_bf16(bf16_instruction_set, threads):
    check_packed(threads, cases(0, 110, (torch.bfloat16,)))


def check_packed(threads, cases) -> None:
    for block, rows, grid, dtype, mask, count, _ in cases:
        (m1, n1), (bm, bn) = grid, block
        threads(count)
        position = torch.randperm(mask.numel()) if rows % 2 else None
        index = BlockIndex.from_mask(mask, position)
        live, capacity = int(index.crow[-1]), len(index.slot)
        values = torch.randn(capacity, bm, bn, dtype=dtype)
        x, dy, bias = (torch.randn(s, dtype=dtype) for s in ((rows, n1 * bn), (rows, m1 * bm), (m1 * bm,)))
        slots, places = index.slot[:live].long(), list(zip(index.row[:live].tolist(), index.col[:live].tolist(), strict=True))

        def weight(values, slots=slots, places=places, grid=grid):
            return reference.packed_weight(values[slots], places, grid)

        y = both(lambda x, v, b, weight=weight: x @ weight(v).T + b, x, values, bias)
        assert_close(native.packed_linear(x, values, index, bias), *y, terms=n1 * bn + 1)
        dx = both(lambda dy, v, weight=weight: dy @ weight(v), dy, values)
        assert_close(native.packed_grad_input(dy, values, index), *dx, terms=m1 * bm)

        def blocks(dy, x, grid=grid, block=block, mask=mask):
            return (dy.T @ x).view(grid[0], block[0], grid[1], block[1]).transpose(1, 2)[mask]

        dvalues = native.packed_grad_values(dy, x, index)
        assert_close(dvalues[slots], *both(blocks, dy, x), terms=rows)
        dvalues[slots] = 0
        assert (dvalues == 0).all(), "slots that are not listed"


@pytest.mark.slow
@pytest.mark.parametrize("plan", ("coeff_first", "tile_first"))
def test_factored(instruction_set, threads, plan):
    check_factored(threads, plan, cases(1, 200))


@pytest.mark.slow
@pytest.mark.parametrize("plan", ("coeff_first", "tile_first"))
def test_factored_in_bf16(bf16_instruction_set, threads, plan):
    pairs = bf16_instruction_set == "avx512bf16" and plan == "coeff_first"  # what stands between two products of pairs is bf16
    check_factored(threads, plan, cases(1, 100, (torch.bfloat16,)), ranks=(2, 3, 4, 8), stages=2 if pairs else 1)


def check_factored(threads, plan, cases, ranks=(1, 2, 3, 4, 5, 7), stages: int = 1) -> None:
    for block, rows, grid, dtype, mask, count, pick in cases:
        if block == (128, 128):
            continue
        (m1, n1), (bm, bn) = grid, block
        threads(count)
        rank, groups = pick(ranks), pick([g for g in range(1, m1 + 1) if m1 % g == 0])
        live = pick((mask, None))
        shapes = ((rows, n1 * bn), (m1, n1, rank), (groups, rank, bm, bn), (m1 * bm,), (rows, m1 * bm))
        x, coeff, tiles, bias, dy = (torch.randn(shape, dtype=dtype) for shape in shapes)

        def results(x, coeff, tiles, bias, dy, live=live):
            leaves = [t.requires_grad_() for t in (x, coeff, tiles)]
            y = reference.kron_linear(*leaves, bias, live=live)
            return y.detach(), *torch.autograd.grad(y, leaves, dy, materialize_grads=True)

        exact, size = both(results, x, coeff, tiles, bias, dy)
        actual = [native.kron_linear(x, coeff, tiles, bias, live, PLANS[plan])]
        actual += native.kron_backward(dy, x, coeff, tiles, live, PLANS[plan], True)
        terms = max(n1 * bn * rank, m1 * bm * rank, rows * bm * bn, rows * m1 * n1)
        for found, wanted, bound in zip(actual, exact, size, strict=True):
            assert_close(found, wanted, bound, terms=terms, stages=stages)
        if live is not None:
            assert (actual[2][~live] == 0).all()
        without = native.kron_backward(dy, x, coeff, tiles, live, PLANS[plan], False)
        assert without[0] is None
        assert_close(without[1], exact[2], size[2], terms=terms, stages=stages)
        assert_close(without[2], exact[3], size[3], terms=terms, stages=stages)


def test_live_blocks(instruction_set, threads):
    check_live_blocks(threads, cases(2, 60))


def test_live_blocks_in_bf16(bf16_instruction_set, threads):
    check_live_blocks(threads, cases(2, 30, (torch.bfloat16,)))


def check_live_blocks(threads, cases) -> None:
    for block, rows, grid, dtype, mask, count, pick in cases:
        (m1, _), (bm, bn) = grid, block
        threads(count)
        rank, groups = pick((1, 2, 4, 5)), pick([g for g in range(1, m1 + 1) if m1 % g == 0])
        index = BlockIndex.from_mask(mask, torch.arange(mask.numel()) if rows % 2 else None)
        live = int(index.crow[-1])
        coeff, tiles = torch.randn(*grid, rank, dtype=dtype), torch.randn(groups, rank, bm, bn, dtype=dtype)
        dvalues = torch.randn(len(index.slot), bm, bn, dtype=dtype)

        def results(coeff, tiles, dvalues, mask=mask, groups=groups):
            leaves = [t.requires_grad_() for t in (coeff, tiles)]
            banks = tiles.repeat_interleave(mask.shape[0] // groups, 0)
            values = torch.einsum("pqi,piab->pqab", coeff, banks)[mask]
            return values.detach(), *torch.autograd.grad(values, leaves, dvalues[: len(values)], materialize_grads=True)

        values = native.live_blocks(coeff, tiles, index)
        assert (values[live:] == 0).all()
        actual = (values[:live], *native.live_blocks_backward(dvalues, coeff, tiles, index))
        for found, wanted, bound in zip(actual, *both(results, coeff, tiles, dvalues), strict=True):
            assert_close(found, wanted, bound, terms=max(rank, bm * bn, mask.numel()))
        assert (actual[1][~mask] == 0).all()


CONVOLUTIONS = (  # images, out_channels, geometry, block; one image alone is cut into frames, and several share one
    ((9, 64, 11, 9), 16, (3, 3, 1, 1, 1, 1, 1, 1), (16, 16)),
    ((4, 64, 7, 7), 32, (3, 3, 1, 1, 1, 1, 1, 1), (8, 32)),
    ((1, 8, 130, 120), 4, (3, 2, 2, 0, 1, 0, 1, 3), (1, 4)),
    ((3, 16, 3, 3), 21, (7, 7, 3, 3, 3, 3, 1, 1), (7, 4)),
    ((2, 32, 20, 10), 20, (3, 3, 8, 8, 8, 8, 8, 8), (5, 8)),
    ((6, 48, 9, 16), 33, (1, 1, 0, 0, 0, 0, 1, 1), (3, 16)),
)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
def test_convolutions(bf16_instruction_set, threads, dtype):
    """By all threads together and each alone, whose results are the same bits: against products with patches."""
    for (shape, outputs, geometry, block), count in zip(CONVOLUTIONS, itertools.cycle((2, 3)), strict=False):
        kernel = ConvGeometry(*geometry)
        mask = torch.rand(outputs // block[0], kernel.positions * shape[1] // block[1]) < 0.3
        index = BlockIndex.from_mask(mask, torch.randperm(mask.numel()))
        x, bias = torch.randn(shape, dtype=dtype), torch.randn(outputs, dtype=dtype)
        dy = torch.randn(shape[0], outputs, *kernel.result(*shape[2:]), dtype=dtype)
        values = torch.randn(mask.numel(), *block, dtype=dtype)
        listed = index.slot[: int(index.crow[-1])].long()
        dead = torch.ones(mask.numel(), dtype=torch.bool).index_fill(0, listed, False)
        operators = torch.ops.kronblocks

        def results(index=index, x=x, values=values, bias=bias, dy=dy, geometry=geometry, operators=operators):
            return (
                operators.packed_conv2d(x, values, bias, *index, *geometry),
                operators.packed_conv2d_grad_input(dy, values, *index, *geometry),
                operators.packed_conv2d_grad_values(dy, x, *index, *geometry),
            )

        def patched(x, values, bias, dy, index=index, kernel=kernel):
            patches, rows = kernel.patches(x), dy.permute(0, 2, 3, 1).contiguous()
            y = plain.packed_linear(patches.flatten(0, 2), values, index, bias)
            dx = plain.packed_grad_input(rows.flatten(0, 2), values, index)
            dvalues = plain.packed_grad_values(rows.flatten(0, 2), patches.flatten(0, 2), index)
            return y.view(*rows.shape).permute(0, 3, 1, 2), kernel.joined(dx.view(patches.shape)), dvalues

        threads(count)
        actual = results()
        terms = max(shape[1], outputs) * kernel.positions + dy.numel() // outputs
        for found, wanted, size in zip(actual, *both(patched, x, values, bias, dy), strict=True):
            assert_close(found, wanted, size, terms=terms)
        assert (actual[2][dead] == 0).all()
        threads(1)
        for found, alone in zip(actual, results(), strict=True):
            assert torch.equal(found, alone)


def test_nan_and_infinity_in_bf16(bf16_instruction_set):
    """They reach the outputs whose live blocks read them, and no other; what is too large for bf16 becomes infinite."""
    mask = torch.tensor([[1, 0], [0, 1], [1, 1]], dtype=torch.bool)
    index = BlockIndex.from_mask(mask)
    for block in ((4, 4), (3, 5), (16, 16), (8, 32)):
        for rows in (2, 17):
            x = torch.ones(rows, 2 * block[1], dtype=torch.bfloat16)
            x[0, 0], x[1, -1] = torch.nan, torch.inf
            y = native.packed_linear(x, torch.ones(4, *block, dtype=torch.bfloat16), index).unflatten(1, (3, block[0])).float()
            wanted = torch.full_like(y, 1).mul(torch.tensor([1, 1, 2])[:, None] * block[1])
            wanted[0, [0, 2]], wanted[1, [1, 2]] = torch.nan, torch.inf
            assert torch.equal(y.nan_to_num(-1), wanted.nan_to_num(-1))
            large = torch.full((rows, 3 * block[0]), 3e38, dtype=torch.bfloat16)
            dvalues = native.packed_grad_values(large, torch.ones(rows, 2 * block[1], dtype=torch.bfloat16), index)
            assert (dvalues == torch.inf).all()


@pytest.mark.parametrize("block", ((4, 4), (3, 6), (16, 16)))
@pytest.mark.parametrize("rows", (1, 3, 40))
def test_bf16_at_odd_addresses(bf16_instruction_set, block, rows):
    """Tensors may begin at any multiple of two bytes."""

    def shifted(t):
        return torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape)

    index = BlockIndex.from_mask(torch.rand(5, 4) < 0.6)
    shapes = ((rows, 4 * block[1]), (len(index.slot), *block), (rows, 5 * block[0]))
    x, values, dy = (torch.randn(shape, dtype=torch.bfloat16) for shape in shapes)
    for product, arguments in (
        (native.packed_linear, (x, values)),
        (native.packed_grad_input, (dy, values)),
        (native.packed_grad_values, (dy, x)),
    ):
        assert torch.equal(product(*map(shifted, arguments), index), product(*arguments, index))


@pytest.mark.parametrize("count", (1, 2, 3))
def test_the_same_bits_from_run_to_run(instruction_set, threads, count):
    threads(count)
    mask = torch.rand(12, 10) < 0.4
    index = BlockIndex.from_mask(mask)
    x, dy, values = torch.randn(333, 80), torch.randn(333, 48), torch.randn(len(index.slot), 4, 8)
    coeff, tiles = torch.randn(12, 10, 3), torch.randn(4, 3, 4, 8)

    def everything():
        results = [native.packed_linear(x, values, index), native.packed_grad_input(dy, values, index)]
        results.append(native.packed_grad_values(dy, x, index))
        for plan in ("coeff_first", "tile_first"):
            results.append(native.kron_linear(x, coeff, tiles, None, mask, PLANS[plan]))
            results += native.kron_backward(dy, x, coeff, tiles, mask, PLANS[plan], True)
        return [*results, *native.live_blocks_backward(values, coeff, tiles, index)]

    first = everything()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, everything(), strict=True))


def test_nan_of_dead_blocks_goes_nowhere(instruction_set):
    check_nan_of_dead_blocks(torch.float32)


def test_nan_of_dead_blocks_goes_nowhere_in_bf16(bf16_instruction_set):
    check_nan_of_dead_blocks(torch.bfloat16)


def check_nan_of_dead_blocks(dtype: torch.dtype) -> None:
    """NaN in dead coefficients, and in x where only dead blocks read it (with whole block columns dead)."""
    mask = torch.rand(6, 9) < 0.3
    mask[:, 4], mask[:, 5] = False, True
    x, dy = torch.randn(21, 36, dtype=dtype), torch.randn(21, 24, dtype=dtype)
    x[:, 16:20] = torch.nan
    for plan, rank in itertools.product(("coeff_first", "tile_first"), (3, 4)):
        tiles = torch.randn(2, rank, 4, 4, dtype=dtype)
        coeff = torch.where(mask.unsqueeze(-1), torch.randn(6, 9, rank), torch.nan).to(dtype)
        assert torch.isfinite(native.kron_linear(x, coeff, tiles, None, mask, PLANS[plan])).all()
        gradients = native.kron_backward(dy, x.nan_to_num(0), coeff, tiles, mask, PLANS[plan], True)
        assert all(torch.isfinite(t).all() for t in gradients)


@pytest.mark.slow
def test_limit_by_environment():
    """KRONBLOCKS_ISA names the kernels to take; nonsense is ignored."""
    code = "from kronblocks.ops.backends import library; print(library.load().instruction_set())"
    for wanted, expected in (("baseline", "baseline"), ("nonsense", native.loaded_library().instruction_set())):
        environment = {**os.environ, "KRONBLOCKS_ISA": wanted}
        found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert found.stdout.strip() == expected
