"""Block norms without building the weight (equation 10 in docs/math.md), also where a Gram matrix cancels."""

import pytest
import torch

from kronblocks import KronblocksError
from kronblocks.ops import block_norms, reference

UNIT = torch.finfo(torch.float32).eps / 2


def factors(m1=4, n1=3, rank=2, groups=1, bm=3, bn=5, dtype=torch.float64):
    return torch.randn(m1, n1, rank, dtype=dtype), torch.randn(groups, rank, bm, bn, dtype=dtype)


def scale(coeff: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
    """|F| |u| per block, (m1, n1): what rounding errors are relative to (docs/math.md, after equation 10)."""
    of_groups = torch.linalg.vector_norm(tiles.double(), dim=(1, 2, 3)).repeat_interleave(coeff.shape[0] // tiles.shape[0])
    return of_groups[:, None] * torch.linalg.vector_norm(coeff.double(), dim=2)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(("bm", "bn"), [(3, 5), (1, 2), (2, 1), (1, 1), (1, 3)])
def test_against_reference(rank, groups, bm, bn):
    """Ranks below, at and above the block's area."""
    coeff, tiles = factors(rank=rank, groups=groups, bm=bm, bn=bn)
    norms = block_norms(coeff, tiles)
    assert norms.shape == (4, 3)
    # QR and |R u| lose a few units (2**-53) times r*area = 45 of |F| |u|
    error = (norms - reference.block_norms(coeff, tiles)).abs()
    assert (error <= 45 * 2.0**-53 * 4 * scale(coeff, tiles)).all()


@pytest.mark.parametrize(
    ("dtype", "computed"), [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.float32)]
)
def test_dtype_is_at_least_fp32(dtype, computed):
    coeff, tiles = factors(groups=2, dtype=dtype)
    norms = block_norms(coeff, tiles)
    assert norms.dtype == computed
    error = (norms.double() - reference.block_norms(coeff.double(), tiles.double())).abs()
    assert (error <= 30 * 4 * UNIT * scale(coeff, tiles)).all()  # as above, in fp32, with r*area = 30


def by_gram(coeff: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
    """The square root of u^T (F^T F) u, the way not taken."""
    flat = tiles[0].flatten(1)
    return torch.einsum("pqi,ij,pqj->pq", coeff, flat @ flat.t(), coeff).clamp_min(0).sqrt()


@pytest.mark.parametrize("difference", [1e-3, 1e-4, 1e-5])
def test_nearly_parallel_tiles(difference):
    """Opposite coefficients on tiles that differ by 1e-4: QR keeps digits in fp32 where the Gram matrix has none left.

    QR's error is of order u |F| |u|, here 6e-8 * 13 against norms of 5e-4 or more; the Gram way's is of order sqrt(u) |F| |u|.
    """
    base = torch.randn(1, 1, 8, 8)
    tiles = torch.cat([base, base + difference * torch.randn(1, 1, 8, 8)], 1)
    coeff = torch.tensor([1.0, -1.0]) * torch.linspace(0.5, 2, 12).view(4, 3, 1)
    exact = reference.block_norms(coeff.double(), tiles.double())
    qr_error = ((block_norms(coeff, tiles).double() - exact).abs() / exact).max()
    gram_error = ((by_gram(coeff, tiles).double() - exact).abs() / exact).max()
    allowed = (4 * UNIT * scale(coeff, tiles) / exact).max()
    assert qr_error <= allowed
    assert allowed < 0.15, "the bound says something: norms are far above QR's error"
    if difference <= 1e-4:
        assert gram_error > 20 * qr_error
        assert gram_error > 0.1, "the Gram matrix has lost them"


def test_nearly_parallel_tiles_with_groups_and_more_terms():
    """A group of good tiles is not disturbed by a bad one, and the rank may exceed 2."""
    base = torch.randn(1, 1, 4, 4)
    bad = base + 1e-4 * torch.randn(1, 5, 4, 4)
    tiles = torch.cat([bad, torch.randn(1, 5, 4, 4)])
    coeff = torch.randn(6, 3, 5)
    coeff[:3] -= coeff[:3].mean(2, keepdim=True)  # coefficients that sum to 0 cancel what the tiles share
    exact = reference.block_norms(coeff.double(), tiles.double())
    error = (block_norms(coeff, tiles).double() - exact).abs()
    assert (error <= 10 * UNIT * scale(coeff, tiles)).all()  # r roundings more than with two tiles
    assert (exact[:3] < 1e-3 * exact[3:].min()).all(), "the first group does cancel"


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("rank", [2, 20])
def test_zeros_are_exact(rank, groups):
    coeff, tiles = factors(rank=rank, groups=groups, dtype=torch.float32)
    coeff[1:3] = 0
    norms = block_norms(coeff, tiles)
    assert (norms[1:3] == 0).all()
    assert (norms[[0, 3]] > 0).all()
    assert (block_norms(torch.zeros_like(coeff), tiles) == 0).all()
    assert (block_norms(coeff, torch.zeros_like(tiles)) == 0).all()


def test_equal_tiles():
    """A rank that is missing outright."""
    tiles = torch.ones(1, 3, 2, 4)
    coeff = torch.tensor([[[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [2.0, -1.0, -1.0]]])
    norms = block_norms(coeff, tiles)
    expected = torch.tensor([[3 * 8**0.5, 0.0, 0.0]])
    assert ((norms - expected).abs() <= 4 * UNIT * scale(coeff, tiles)).all()  # of order u |F| |u|


@pytest.mark.parametrize("which", ["coeff", "tiles"])
def test_any_strides(which, request):
    coeff, tiles = factors(groups=2)
    strided_coeff = coeff.permute(2, 1, 0).contiguous().permute(2, 1, 0) if which == "coeff" else coeff
    strided_tiles = tiles.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0) if which == "tiles" else tiles
    torch.testing.assert_close(block_norms(strided_coeff, strided_tiles), block_norms(coeff, tiles), rtol=1e-13, atol=0)


def test_refuses_shapes():
    coeff, tiles = factors()
    for pair in ((coeff[0], tiles), (coeff, tiles[0]), (coeff[..., :1], tiles), (coeff[:3], tiles.expand(2, -1, -1, -1))):
        with pytest.raises(KronblocksError):
            block_norms(*pair)
