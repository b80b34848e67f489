"""The nearest sum of Kronecker products (equation 11 in docs/math.md) and the canonical form (equation 12)."""

import pytest
import torch

from kronblocks import KronblocksError
from kronblocks.ops import BlockGrid, BlockSize, canonical_form, kron_weight, nearest_kronecker_sum, reference

GRID = BlockGrid(12, 15, BlockSize(3, 5))  # 4x3 blocks of 15 weights
EXACT = 1e-13  # SVD and products of at most 15 numbers of size about 1, in float64


def rearranged(weight: torch.Tensor, grid: BlockGrid, groups: int) -> torch.Tensor:
    """One block a row, group by group, by slicing: (g, m1*n1/g, area)."""
    (m1, n1), (bm, bn) = grid.shape, grid.block
    rows = [
        weight[p * bm : (p + 1) * bm, q * bn : (q + 1) * bn].flatten() for p in range(m1) for q in range(n1)
    ]  # in row-major order
    return torch.stack(rows).view(groups, -1, bm * bn)


def assert_orthonormal(tiles: torch.Tensor, tolerance: float = EXACT) -> None:
    flat = tiles.flatten(2)
    gram, identity = flat @ flat.transpose(1, 2), torch.eye(flat.shape[1], dtype=flat.dtype)
    torch.testing.assert_close(gram, identity.expand_as(gram), rtol=0, atol=tolerance)


def assert_signs_and_order(coeff: torch.Tensor, tiles: torch.Tensor) -> None:
    """Each tile's entry of largest magnitude is positive; the size of terms descends within each group."""
    flat = tiles.flatten(2)
    assert (flat.gather(2, flat.abs().argmax(2, keepdim=True)) >= 0).all()
    sizes = coeff.reshape(tiles.shape[0], -1, tiles.shape[1]).norm(dim=1)
    assert (sizes.diff(dim=1) <= EXACT).all()


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("rank", [1, 2, 3, 7])
def test_optimal(rank, groups):
    """The error is what the singular values beyond the rank leave (Eckart and Young), per group, and W is that near."""
    weight = torch.randn(12, 15, dtype=torch.float64)
    coeff, tiles, error = nearest_kronecker_sum(weight, GRID, rank, tile_groups=groups)
    assert coeff.shape == (4, 3, rank)
    assert tiles.shape == (groups, rank, 3, 5)
    tail = torch.linalg.svdvals(rearranged(weight, GRID, groups))[:, rank:]
    expected = float(tail.square().sum().sqrt() / weight.norm())
    assert error == pytest.approx(expected, rel=1e-12, abs=EXACT)
    real = float((reference.kron_weight(coeff, tiles) - weight).norm() / weight.norm())
    assert real == pytest.approx(expected, rel=1e-12, abs=EXACT)
    possible = min(rank, 12 // groups)
    assert_orthonormal(tiles[:, :possible])
    assert_signs_and_order(coeff, tiles)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_exact_when_the_rank_suffices(groups):
    """A mixture of 2 tiles is found again by 2, and not by 1."""
    coeff, tiles = torch.randn(4, 3, 2, dtype=torch.float64), torch.randn(groups, 2, 3, 5, dtype=torch.float64)
    weight = reference.kron_weight(coeff, tiles)
    *found, error = nearest_kronecker_sum(weight, GRID, 2, tile_groups=groups)
    assert error < EXACT
    torch.testing.assert_close(reference.kron_weight(*found), weight, rtol=0, atol=EXACT * 10)
    assert nearest_kronecker_sum(weight, GRID, 1, tile_groups=groups)[2] > 1e-2


@pytest.mark.parametrize(
    ("grid", "rank"), [(GRID, 12), (BlockGrid(12, 15, BlockSize(1, 3)), 3), (BlockGrid(12, 15, BlockSize(1, 1)), 1)]
)
def test_any_weight_is_exact_at_full_rank(grid, rank):
    """min(blocks, area) terms suffice, and one fewer do not."""
    weight = torch.randn(12, 15, dtype=torch.float64)
    *found, error = nearest_kronecker_sum(weight, grid, rank)
    assert error == pytest.approx(0, abs=EXACT)
    torch.testing.assert_close(reference.kron_weight(*found), weight, rtol=0, atol=EXACT * 10)
    if rank > 1:
        assert nearest_kronecker_sum(weight, grid, rank - 1)[2] > 1e-3


@pytest.mark.parametrize(("groups", "possible"), [(1, 12), (2, 6), (4, 3)])
def test_rank_beyond_the_possible_pads_with_zeros(groups, possible):
    weight = torch.randn(12, 15, dtype=torch.float64)
    coeff, tiles, error = nearest_kronecker_sum(weight, GRID, possible + 4, tile_groups=groups)
    assert coeff.shape[2] == tiles.shape[1] == possible + 4
    assert (coeff[:, :, possible:] == 0).all()
    assert (tiles[:, possible:] == 0).all()
    assert error == 0
    torch.testing.assert_close(reference.kron_weight(coeff, tiles), weight, rtol=0, atol=EXACT * 10)


def test_zero_weight():
    coeff, tiles, error = nearest_kronecker_sum(torch.zeros(12, 15), GRID, 3)
    assert error == 0
    assert (coeff == 0).all()
    assert torch.isfinite(tiles).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_is_kept(dtype):
    """Computed in fp32 and stored in the weight's dtype: each of 2 terms' two factors is rounded once."""
    weight = torch.randn(12, 15).to(dtype)
    coeff, tiles, error = nearest_kronecker_sum(weight, GRID, 2)
    assert coeff.dtype == tiles.dtype == dtype
    exact = nearest_kronecker_sum(weight.double(), GRID, 2)
    # the relative error is computed from fp32 singular values
    assert error == pytest.approx(exact[2], rel=1e-5)
    bound = 3 * torch.finfo(dtype).eps * reference.kron_weight(exact[0].abs(), exact[1].abs()) + 1e-5
    difference = reference.kron_weight(coeff.double(), tiles.double()) - reference.kron_weight(*exact[:2])
    assert (difference.abs() <= bound).all()


def test_the_weight_is_left_alone_and_no_graph_is_kept():
    weight = torch.randn(12, 15, requires_grad=True)
    before = weight.detach().clone()
    coeff, tiles, _ = nearest_kronecker_sum(weight, GRID, 2)
    assert not coeff.requires_grad
    assert not tiles.requires_grad
    assert torch.equal(weight, before)


def test_strided_weight():
    weight = torch.randn(15, 12, dtype=torch.float64).t()
    found = nearest_kronecker_sum(weight, GRID, 3)
    again = nearest_kronecker_sum(weight.contiguous(), GRID, 3)
    assert all(torch.equal(a, b) for a, b in zip(found[:2], again[:2], strict=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_refuses_what_is_not_finite(value):
    weight = torch.randn(12, 15)
    weight[5, 7] = value
    with pytest.raises(KronblocksError, match=r"not finite .*fix or reinitialise"):
        nearest_kronecker_sum(weight, GRID, 2)


def test_refuses_shapes_ranks_and_groups():
    weight = torch.randn(12, 15)
    for wrong in (weight.t(), weight[:9], weight[None]):
        with pytest.raises(KronblocksError, match="grid is for 12x15 in 3x5 blocks"):
            nearest_kronecker_sum(wrong, GRID, 2)
    for rank, groups in ((0, 1), (-1, 1), (2, 0), (2, 3), (2, 8), (2, -2)):
        with pytest.raises(KronblocksError, match="tile_groups divide 4 block rows"):
            nearest_kronecker_sum(weight, GRID, rank, tile_groups=groups)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("rank", [1, 2, 5, 15])
def test_canonical_form(rank, groups):
    """Same W, orthonormal tiles, ordered, signed, norms in the coefficients; also with fewer blocks than terms in a group."""
    coeff, tiles = torch.randn(4, 3, rank, dtype=torch.float64), torch.randn(groups, rank, 3, 5, dtype=torch.float64)
    new_coeff, new_tiles = canonical_form(coeff, tiles)
    assert new_coeff.shape == coeff.shape
    assert new_tiles.shape == tiles.shape
    weight = reference.kron_weight(coeff, tiles)
    torch.testing.assert_close(kron_weight(new_coeff, new_tiles), weight, rtol=0, atol=EXACT * 10)
    assert_orthonormal(new_tiles)
    assert_signs_and_order(new_coeff, new_tiles)
    torch.testing.assert_close(new_coeff.norm(dim=2), GRID.norms(weight), rtol=1e-12, atol=EXACT)


@pytest.mark.parametrize("groups", [1, 2])
def test_canonical_form_is_idempotent(groups):
    """Unique where singular values are distinct and positive, so it leaves its own result as it is."""
    once = canonical_form(torch.randn(4, 3, 3, dtype=torch.float64), torch.randn(groups, 3, 3, 5, dtype=torch.float64))
    twice = canonical_form(*once)
    for a, b in zip(once, twice, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=EXACT * 10)


def test_canonical_form_does_not_depend_on_the_gauge():
    """C K and F K^-T give the same W (docs/math.md), so the same canonical form."""
    coeff, tiles = torch.randn(4, 3, 2, dtype=torch.float64), torch.randn(1, 2, 3, 5, dtype=torch.float64)
    change = torch.tensor([[2.0, 1.0], [-0.5, 1.0]], dtype=torch.float64)
    other = coeff @ change, torch.einsum("gjab,ij->giab", tiles, torch.linalg.inv(change))
    for a, b in zip(canonical_form(coeff, tiles), canonical_form(*other), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=EXACT * 10)


def test_canonical_form_agrees_with_the_nearest_sum():
    coeff, tiles = torch.randn(4, 3, 2, dtype=torch.float64), torch.randn(2, 2, 3, 5, dtype=torch.float64)
    nearest = nearest_kronecker_sum(reference.kron_weight(coeff, tiles), GRID, 2, tile_groups=2)
    for a, b in zip(canonical_form(coeff, tiles), nearest[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=EXACT * 10)


def test_canonical_form_keeps_dead_blocks_dead_up_to_rounding():
    coeff, tiles = torch.randn(4, 3, 2), torch.randn(1, 2, 3, 5)
    coeff[1, 2] = coeff[3] = 0
    new_coeff, _ = canonical_form(coeff, tiles)
    dead = (coeff == 0).all(2)
    assert new_coeff[dead].abs().max() <= 1e-6 * new_coeff.abs().max()  # a few fp32 units, 6e-8, of the largest
    assert (new_coeff[~dead].abs().amax(1) > 1e-2).all()


def test_canonical_form_of_missing_rank():
    """Equal tiles: still orthonormal, the missing term has no size."""
    tiles = torch.ones(1, 2, 3, 5, dtype=torch.float64)
    coeff = torch.randn(4, 3, 2, dtype=torch.float64)
    new_coeff, new_tiles = canonical_form(coeff, tiles)
    assert_orthonormal(new_tiles)
    torch.testing.assert_close(kron_weight(new_coeff, new_tiles), kron_weight(coeff, tiles), rtol=0, atol=EXACT * 10)
    assert new_coeff[:, :, 1].abs().max() < EXACT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_canonical_form_keeps_the_dtype(dtype):
    coeff, tiles = torch.randn(4, 3, 2).to(dtype), torch.randn(1, 2, 3, 5).to(dtype)
    new = canonical_form(coeff, tiles)
    assert [t.dtype for t in new] == [dtype, dtype]
    # each of two factors in two terms is rounded to the dtype once, before that fp32 was exact to about 1e-6
    bound = 3 * torch.finfo(dtype).eps * reference.kron_weight(*(t.double().abs() for t in new)) + 1e-5
    assert (
        (reference.kron_weight(*(t.double() for t in new)) - reference.kron_weight(coeff.double(), tiles.double())).abs() <= bound
    ).all()


def test_canonical_form_refuses_more_tiles_than_area():
    with pytest.raises(KronblocksError, match="no 7 orthonormal tiles exist in blocks of 2x3: the rank must be at most 6"):
        canonical_form(torch.randn(4, 3, 7), torch.randn(1, 7, 2, 3))


@pytest.mark.parametrize(
    "shapes", [((4, 3, 1), (2, 2, 3, 5)), ((4, 3, 2), (3, 2, 3, 5)), ((3, 2), (1, 2, 3, 5)), ((4, 3, 2), (2, 3, 5))]
)
def test_canonical_form_refuses_shapes(shapes):
    with pytest.raises(KronblocksError):
        canonical_form(*(torch.randn(shape) for shape in shapes))


def test_canonical_form_of_strided_coefficients():
    coeff, tiles = torch.randn(2, 3, 4, dtype=torch.float64).permute(2, 1, 0), torch.randn(1, 2, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(canonical_form(coeff, tiles)[0], canonical_form(coeff.contiguous(), tiles)[0], rtol=0, atol=EXACT)
