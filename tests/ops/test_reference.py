"""The oracle itself, against loops over single weights (equations 2 and 7 in docs/math.md)."""

import torch

from kronblocks.ops import reference


def test_kron_weight_by_loops():
    coeff, tiles = torch.randn(4, 3, 2, dtype=torch.float64), torch.randn(2, 2, 3, 5, dtype=torch.float64)
    weight = torch.empty(12, 15, dtype=torch.float64)
    for row in range(12):
        for column in range(15):
            (p, a), (q, b) = divmod(row, 3), divmod(column, 5)
            weight[row, column] = sum(coeff[p, q, i] * tiles[p * 2 // 4, i, a, b] for i in range(2))
    torch.testing.assert_close(reference.kron_weight(coeff, tiles), weight, rtol=1e-14, atol=1e-14)  # 2 products in float64


def test_kron_linear_by_loops():
    coeff, tiles = torch.randn(2, 3, 2, dtype=torch.float64), torch.randn(1, 2, 3, 5, dtype=torch.float64)
    x, bias = torch.randn(2, 15, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    live = torch.tensor([[True, False, True], [False, False, True]])
    y = bias.repeat(2, 1)
    for p, q in live.nonzero().tolist():
        for i in range(2):
            y[:, 3 * p : 3 * p + 3] += coeff[p, q, i] * x[:, 5 * q : 5 * q + 5] @ tiles[0, i].T
    # at most 31 products of size about 1 in float64
    torch.testing.assert_close(reference.kron_linear(x, coeff, tiles, bias, live), y, rtol=1e-13, atol=1e-13)


def test_block_norms_by_loops():
    coeff, tiles = torch.randn(2, 3, 2, dtype=torch.float64), torch.randn(2, 2, 3, 5, dtype=torch.float64)
    norms = torch.tensor(
        [[float((coeff[p, q, :, None, None] * tiles[p]).sum(0).square().sum()) ** 0.5 for q in range(3)] for p in range(2)],
        dtype=torch.float64,
    )
    torch.testing.assert_close(reference.block_norms(coeff, tiles), norms, rtol=1e-14, atol=0)  # 15 squares in float64


def test_packed_weight():
    values = torch.arange(12.0).view(2, 2, 3)
    weight = reference.packed_weight(values, [(1, 0), (0, 1)], (2, 2))
    expected = torch.zeros(4, 6)
    expected[2:, :3], expected[:2, 3:] = values[0], values[1]
    assert torch.equal(weight, expected)
