"""Geometry: block sizes read and refused, grids, views between weights and blocks, fitted sizes."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kronblocks import KronblocksError
from kronblocks.core.blocks import divisors
from kronblocks.ops import BlockGrid, BlockSize

SIDES = st.integers(1, 7)
GRIDS = st.builds(
    lambda m1, n1, bm, bn: BlockGrid(m1 * bm, n1 * bn, BlockSize(bm, bn)), *(st.integers(1, 5) for _ in range(2)), SIDES, SIDES
)


@pytest.mark.parametrize(
    ("value", "sides"),
    [
        (16, (16, 16)),
        ("16", (16, 16)),
        ("16x4", (16, 4)),
        (" 16 x 4 ", (16, 4)),
        ("1x1", (1, 1)),
        ((16, 4), (16, 4)),
        ([16, 4], (16, 4)),
        (torch.Size((16, 4)), (16, 4)),
        (BlockSize(16, 4), (16, 4)),
        ("007x010", (7, 10)),
    ],
)
def test_parse(value, sides):
    block = BlockSize.parse(value)
    assert (block.rows, block.cols) == sides
    assert tuple(block) == sides
    assert block.area == sides[0] * sides[1]
    assert BlockSize.parse(str(block)) == block


@pytest.mark.parametrize(
    "value",
    [
        *(0, -1, True, False, 1.0, 16.5, None),
        *["0", "-1", "0x4", "4x0", "16y4", "16x", "x4", "16x4x2", "1e3", "1.5", "16.0x4", "four", "1_000", "+4", "16*4"],
        *("", " ", "9" * 400),
        *((), (4,), (4, 4, 4), (4, 0), (-4, 4), (4.0, 4), (4, True), ("4", "4"), [4, None], (float("nan"), 1)),
        *({4: 4}, {4, 8}, b"16", object(), torch.tensor([4, 4])),
    ],
    ids=lambda value: str(value)[:20],
)
def test_parse_refuses(value):
    """Every message says what may be written instead."""
    with pytest.raises(KronblocksError, match=r"16x4"):
        BlockSize.parse(value)


@pytest.mark.parametrize("sides", [(0, 4), (4, -1), (True, 4), (4, False), (4.0, 4), ("4", 4), (None, 4)])
def test_block_size_refuses(sides):
    with pytest.raises(KronblocksError, match="at least 1"):
        BlockSize(*sides)


@given(st.text(alphabet="0123456789xX.- e", max_size=12))
def test_parse_reads_or_refuses_any_text(text):
    """No other exception, and what is read is what was written."""
    try:
        block = BlockSize.parse(text)
    except KronblocksError:
        return
    assert [int(side) for side in text.replace(" ", "").split("x")] in ([block.rows, block.cols], [block.rows])


@given(st.integers(1, 3000))
def test_divisors(number):
    assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]


@given(GRIDS)
def test_round_trip(grid):
    """from_blocks inverts to_blocks, which is a view: writing to a block writes to the weight."""
    weight = torch.randn(grid.out_features, grid.in_features)
    blocks = grid.to_blocks(weight)
    assert blocks.shape == (*grid.shape, grid.block.rows, grid.block.cols)
    assert blocks.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    assert torch.equal(grid.from_blocks(blocks), weight)
    assert torch.equal(grid.to_blocks(grid.from_blocks(blocks.contiguous())), blocks)
    blocks[-1, -1] = 7
    assert (weight[-grid.block.rows :, -grid.block.cols :] == 7).all()


@given(GRIDS)
def test_blocks_norms_and_expand_by_loop(grid):
    """Block (p, q) is rows p*bm.. and columns q*bn.. of the weight."""
    weight = torch.randn(grid.out_features, grid.in_features, dtype=torch.float64)
    blocks, norms = grid.to_blocks(weight), grid.norms(weight)
    expanded = grid.expand(norms)
    (m1, n1), (bm, bn) = grid.shape, grid.block
    assert grid.blocks == m1 * n1
    assert grid.weights == weight.numel()
    assert norms.shape == (m1, n1)
    assert expanded.shape == weight.shape
    for p in range(m1):
        for q in range(n1):
            block = weight[p * bm : (p + 1) * bm, q * bn : (q + 1) * bn]
            assert torch.equal(blocks[p, q], block)
            # both are sums of at most 49 squares in float64
            torch.testing.assert_close(norms[p, q], block.square().sum().sqrt(), rtol=1e-14, atol=0)
            assert (expanded[p * bm : (p + 1) * bm, q * bn : (q + 1) * bn] == norms[p, q]).all()


def test_to_blocks_is_a_view_of_any_strides():
    grid = BlockGrid(6, 8, BlockSize(3, 2))
    for weight in (torch.randn(8, 6).t(), torch.randn(6, 16)[:, ::2], torch.randn(12, 8)[::2], torch.randn(1, 8).expand(6, 8)):
        blocks = grid.to_blocks(weight)
        assert blocks.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
        assert torch.equal(grid.from_blocks(blocks), weight)


@pytest.mark.parametrize(
    ("dtype", "computed"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), *((d, d) for d in (torch.float32, torch.float64))],
)
def test_norms_are_computed_at_least_in_fp32(dtype, computed):
    """256 squares of 2**7 sum to 2**22, above fp16's range; every number here is a power of two, so the result is exact."""
    grid = BlockGrid(32, 32, BlockSize(16, 16))
    norms = grid.norms(torch.full((32, 32), 2.0**7, dtype=dtype))
    assert norms.dtype == computed
    assert (norms == 2.0**11).all()


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40), st.integers(1, 40))
def test_fit_is_the_largest_that_divides_both(out_features, in_features, rows, cols):
    fitted = BlockGrid.fit(out_features, in_features, BlockSize(rows, cols)).block

    def largest(size, wanted):
        return max(d for d in range(1, wanted + 1) if size % d == 0 and wanted % d == 0)

    assert tuple(fitted) == (largest(out_features, rows), largest(in_features, cols))


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 70), st.integers(1, 70))
def test_grid_exists_or_says_what_divides(out_features, in_features, rows, cols):
    """The message names, for each side that does not fit, the divisors just below and above, and a block that fits."""
    if out_features % rows == 0 and in_features % cols == 0:
        assert BlockGrid(out_features, in_features, BlockSize(rows, cols)).shape == (out_features // rows, in_features // cols)
        return
    with pytest.raises(KronblocksError) as caught:
        BlockGrid(out_features, in_features, BlockSize(rows, cols))
    message = str(caught.value)
    for name, size, side in (("out_features", out_features, rows), ("in_features", in_features, cols)):
        below = max(d for d in range(1, side + 1) if size % d == 0)
        above = min((d for d in range(side + 1, size + 1) if size % d == 0), default=None)
        nearest = f"{below}" if above is None else f"{below} and {above}"
        wanted = f"{side} does not divide {name}={size} (nearest that do: {nearest})"
        assert (wanted in message) == bool(size % side)
    suggested = BlockSize.parse(message.split("block_size='")[1].split("'")[0])
    BlockGrid(out_features, in_features, suggested)


@pytest.mark.parametrize("size", [0, -8, 8.0, True, "8", None])
def test_grid_refuses_sizes(size):
    for sides in ((size, 8), (8, size)):
        with pytest.raises(KronblocksError, match="features must be a whole number, at least 1"):
            BlockGrid(*sides, BlockSize(1, 1))


def test_values_compare_hash_and_copy():
    """They are keys of `choose_plan`'s cache and members of layers that are copied."""
    one, other = BlockGrid(6, 8, BlockSize(3, 2)), BlockGrid(6, 8, BlockSize.parse("3x2"))
    assert one == other
    assert hash(one) == hash(other)
    assert copy.deepcopy(one) == one
    assert one != BlockGrid(6, 8, BlockSize(2, 2))
    assert str(one) == "6x8 in 3x2 blocks"


def test_norms_of_zero_blocks_have_no_gradient_and_nothing_hides_a_nan():
    grid = BlockGrid(4, 6, BlockSize(2, 3))
    weight = torch.randn(4, 6, dtype=torch.float64)
    weight[:2, :3] = 0
    weight.requires_grad_()
    (grid.norms(weight) * torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().backward()
    expected = weight.detach() / grid.expand(grid.norms(weight.detach())) * grid.expand(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, expected.nan_to_num(0))
    assert torch.isnan(grid.norms(torch.full((4, 6), torch.nan))).all()
