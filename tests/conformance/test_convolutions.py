"""Convolutions with packed blocks, of every backend: torch's convolution in float64, with all derivatives."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from tests.conformance.backends import over
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import conv2d, pad

from kronblocks.core.errors import KronblocksError
from kronblocks.ops.convolution import packed_conv2d, packed_convolution
from kronblocks.ops.geometry import ConvGeometry, Convolution
from kronblocks.ops.index import BlockIndex
from kronblocks.ops.strided import index_over_phases


class Case(NamedTuple):
    images: tuple[int, int, int, int]
    outputs: int
    geometry: ConvGeometry
    block: tuple[int, int]
    density: float = 0.5

    @property
    def mask(self) -> Tensor:
        """Some blocks, with a dead block row and a dead block column where there are several."""
        m1, n1 = self.outputs // self.block[0], self.images[1] * self.geometry.positions // self.block[1]
        mask = torch.rand(m1, n1) < self.density
        mask[1:2], mask[:, 1:2] = False, False
        return mask

    def dense(self, values: Tensor, mask: Tensor) -> Tensor:
        """The weight of torch's convolution, (outputs, channels, kh, kw)."""
        blocks = values.new_zeros(mask.numel(), *self.block).index_copy(0, mask.flatten().nonzero().squeeze(1), values)
        weight = blocks.view(*mask.shape, *self.block).transpose(1, 2).reshape(self.outputs, -1)
        return weight.unflatten(1, (*self.geometry[:2], self.images[1])).permute(0, 3, 1, 2)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        _, _, top, bottom, left, right, *dilation = self.geometry
        return conv2d(pad(x, (left, right, top, bottom)), weight, bias, dilation=dilation)


CASES = {
    "3x3": Case((2, 4, 9, 8), 6, ConvGeometry(3, 3, 1, 1, 1, 1), (2, 2)),
    "valid": Case((3, 4, 6, 5), 4, ConvGeometry(3, 2), (4, 1)),
    "one pixel": Case((3, 8, 1, 1), 16, ConvGeometry(3, 3, 1, 1, 1, 1), (8, 4)),
    "larger kernel": Case((2, 4, 3, 2), 9, ConvGeometry(7, 5, 3, 3, 2, 2), (3, 4)),
    "uneven": Case((1, 6, 5, 7), 9, ConvGeometry(2, 3, 0, 2, 3, 0, 2, 1), (3, 3)),
    "wide margins": Case((2, 3, 4, 4), 5, ConvGeometry(1, 1, 2, 2, 2, 2), (5, 3), 1.0),
    "1x1": Case((2, 6, 4, 5), 4, ConvGeometry(1, 1), (2, 3)),
    "dilated": Case((2, 4, 12, 10), 8, ConvGeometry(3, 3, 4, 4, 4, 4, 4, 4), (4, 2)),
    "one row": Case((3, 4, 1, 40), 6, ConvGeometry(1, 5, 0, 0, 2, 2), (2, 4)),
    "blocks of 16": Case((4, 16, 7, 7), 32, ConvGeometry(3, 3, 1, 1, 1, 1), (16, 16)),
    "no images": Case((0, 4, 5, 5), 4, ConvGeometry(3, 3, 1, 1, 1, 1), (2, 2)),
    "all dead": Case((2, 4, 5, 5), 4, ConvGeometry(3, 3, 1, 1, 1, 1), (2, 2), 0.0),
}
FEW = ("3x3", "uneven")


def operands(case: Case, mask: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    values = torch.randn(int(mask.sum()), *case.block, dtype=dtype)
    return torch.randn(case.images, dtype=dtype), values, torch.randn(case.outputs, dtype=dtype)


def check(case: Case, dtype: torch.dtype, rounding, with_gradients) -> None:
    mask = case.mask
    index = BlockIndex.from_mask(mask)
    x, values, bias = operands(case, mask, dtype)

    def oracle(x, values, bias):
        return case.convolve(x, case.dense(values, mask), bias)

    dy = torch.randn(oracle(x.double(), values.double(), bias.double()).shape).to(dtype)
    actual = with_gradients(lambda x, v, b: packed_conv2d(x, v, index, b, case.geometry), (x, values, bias), dy)
    assert all(t.dtype == dtype and t.is_contiguous() for t in actual)
    terms = max(case.images[1], case.outputs) * case.geometry.positions + dy.numel() // case.outputs
    rounding(oracle, (x, values, bias), dy, terms=terms).check(actual)


@pytest.mark.parametrize(("backend", "case"), over(((case,) for case in CASES), ((case,) for case in FEW)), indirect=["backend"])
def test_it_is_the_convolution(backend, case, rounding, with_gradients):
    check(CASES[case], torch.float32, rounding, with_gradients)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("backend", over([()], ()), indirect=True)
def test_in_other_dtypes(backend, dtype, rounding, with_gradients):
    check(CASES["3x3"], dtype, rounding, with_gradients)


@pytest.mark.parametrize(("backend", "case"), over((case,) for case in FEW), indirect=["backend"])
def test_derivatives(backend, case):
    chosen = CASES[case]._replace(images=(1, 6, 3, 4), outputs=6)
    index = BlockIndex.from_mask(mask := chosen.mask)
    inputs = [t.requires_grad_() for t in operands(chosen, mask)]

    def function(x, values, bias):
        return packed_conv2d(x, values, index, bias, chosen.geometry)

    assert gradcheck(function, inputs, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("backend", over([()]), indirect=True)
def test_slots_that_are_not_listed_count_nothing(backend):
    """NaN in a dead slot does not reach the output, and its gradient is exactly 0."""
    case = CASES["3x3"]
    mask = case.mask
    index = BlockIndex.from_mask(mask, torch.randperm(mask.numel()))
    live = index.slot[: int(index.crow[-1])].long()
    values = torch.full((mask.numel(), *case.block), torch.nan, dtype=torch.float64)
    x, values[live], bias = operands(case, mask)
    y = packed_conv2d(x, values.requires_grad_(), index, bias, case.geometry)
    torch.testing.assert_close(y, case.convolve(x, case.dense(values[live], mask), bias), rtol=1e-10, atol=1e-10)
    y.sum().backward()
    assert values.grad is not None
    values.grad[live] = 0
    assert (values.grad == 0).all()


@pytest.mark.parametrize(("backend", "case"), over((("uneven",), ("wide margins",), ("all dead",)), ()), indirect=["backend"])
def test_every_output_is_written_after_a_call_full_of_nan(backend, case, poisoned, with_gradients):
    """Also where a kernel's own memory, which it keeps, holds what an earlier call has left."""
    chosen = CASES[case]
    index = BlockIndex.from_mask(mask := chosen.mask)
    x, values, bias = operands(chosen, mask)
    dy = torch.randn_like(packed_conv2d(x, values, index, bias, chosen.geometry))

    def function(x, values, bias):
        return packed_conv2d(x, values, index, bias, chosen.geometry)

    with_gradients(function, [torch.full_like(t, torch.nan) for t in (x, values, bias)], torch.full_like(dy, torch.nan))
    for tensor in with_gradients(function, (x, values, bias), dy):
        assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("backend", over([()], ()), indirect=True)
def test_nan_and_infinity_reach_only_what_reads_them(backend):
    geometry = ConvGeometry(3, 3, 1, 1, 1, 1)
    index = BlockIndex.from_mask(torch.ones(1, 9, dtype=torch.bool))
    x = torch.ones(2, 2, 5, 4)
    x[0, 0, 0, 3], x[1, 1, 4, 0] = torch.nan, torch.inf
    y = packed_conv2d(x, torch.ones(9, 2, 2), index, None, geometry).isfinite()
    wanted = torch.ones_like(y)
    wanted[0, :, :2, 2:], wanted[1, :, 3:, :2] = False, False
    assert torch.equal(y, wanted)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "case"), over([("uneven",), ("all dead",), ("no images",)], ()), indirect=["backend"])
def test_custom_operators(backend, case):
    """Schema, autograd registration and fake tensors of all three."""
    chosen = CASES[case]
    index = BlockIndex.from_mask(mask := chosen.mask)
    x, values, bias = (t.requires_grad_() for t in operands(chosen, mask))
    dy = torch.randn_like(packed_conv2d(x, values, index, bias, chosen.geometry)).requires_grad_()
    operators = torch.ops.kronblocks
    for operator, arguments in (
        (operators.packed_conv2d, (x, values, bias)),
        (operators.packed_conv2d, (x, values, None)),
        (operators.packed_conv2d_grad_input, (dy, values)),
        (operators.packed_conv2d_grad_values, (dy, x)),
    ):
        quick = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(operator, (*arguments, *index, *chosen.geometry), test_utils=quick)


def test_what_does_not_fit_is_refused():
    case = CASES["3x3"]
    index = BlockIndex.from_mask(mask := case.mask)
    x, values, bias = operands(case, mask)
    for images, says in (
        (x[:, :3], "x has 3 features"),
        (x.flatten(2), "x must be .images, channels"),
        (x.float(), "x is torch.float32"),
    ):
        with pytest.raises(KronblocksError, match=says):
            packed_conv2d(images, values, index, bias, case.geometry)
    with pytest.raises(KronblocksError, match="too small for ConvGeometry"):
        packed_conv2d(x[:, :, :2], values, index, bias, case.geometry._replace(top=0, bottom=0))


STRIDED = {
    "3x3": ((2, 4, 9, 8), ConvGeometry(3, 3, 1, 1, 1, 1), (2, 2)),
    "rows that nobody reads": ((2, 4, 8, 9), ConvGeometry(3, 3), (3, 2)),
    "dilated": ((1, 2, 11, 9), ConvGeometry(3, 2, 2, 1, 0, 3, 2, 3), (2, 3)),
    "kernel below the stride": ((2, 4, 7, 7), ConvGeometry(2, 1), (4, 3)),
}


@pytest.mark.parametrize(("backend", "case"), over((case,) for case in STRIDED), indirect=["backend"])
def test_strides_above_1(backend, case, with_gradients):
    """Without patches, with dead slots and free order of the slots, and again after blocks have died."""
    shape, geometry, stride = STRIDED[case]
    known = Case(shape, 6, geometry, (3, 2))
    mask = known.mask
    position, convolution = torch.randperm(mask.numel()), Convolution(geometry, stride)
    for _ in range(2):
        index = BlockIndex.from_mask(mask, position)
        values = torch.randn(mask.numel(), 3, 2, dtype=torch.float64)
        values[~mask.flatten()[position]] = torch.nan
        live = mask.flatten().nonzero().squeeze(1)
        x, bias = torch.randn(shape, dtype=torch.float64), torch.randn(6, dtype=torch.float64)

        def oracle(x, values, bias, live=live, mask=mask):
            at = torch.empty_like(position).scatter_(0, position, torch.arange(len(position)))
            top, bottom, left, right = geometry.margins
            weight = known.dense(values[at[live]], mask)
            return conv2d(pad(x, (left, right, top, bottom)), weight, bias, stride, dilation=geometry[6:])

        dy = torch.randn_like(oracle(x, values, bias))
        actual = with_gradients(lambda x, v, b, i=index: packed_convolution(x, v, i, b, convolution), (x, values, bias), dy)
        expected = with_gradients(oracle, (x, values, bias), dy)
        for ours, right in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours, right, rtol=1e-10, atol=1e-10)  # float64 sums in another order
        mask = mask & (torch.rand(mask.shape) < 0.7)


def test_an_index_over_phases_is_made_once_and_again_after_it_was_written_into():
    convolution = Convolution(ConvGeometry(3, 3), (2, 2))
    mask = torch.rand(3, 9) < 0.5
    index = BlockIndex.from_mask(mask, torch.arange(27))
    first = index_over_phases(index, convolution)
    assert index_over_phases(index, convolution) is first
    for old, new in zip(index, BlockIndex.from_mask(~mask, torch.arange(27)), strict=True):
        old.copy_(new)
    assert int(index_over_phases(index, convolution).crow[-1]) == int((~mask).sum())


def test_strided_images_that_do_not_fit_are_refused():
    index = BlockIndex.from_mask(torch.ones(2, 18, dtype=torch.bool))
    values, convolution = torch.randn(36, 2, 2), Convolution(ConvGeometry(3, 3), (2, 2))
    with pytest.raises(KronblocksError, match="too small"):
        packed_convolution(torch.randn(1, 4, 2, 2), values, index, None, convolution)
    with pytest.raises(KronblocksError, match="x has 6 features, but 2 block columns of 2"):
        packed_convolution(torch.randn(1, 6, 5, 5), values, index, None, convolution)
