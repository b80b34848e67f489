"""`kron_linear`, `kron_weight` and `packed_linear` as callers meet them: what is accepted, what is refused and how."""

import pytest
import torch

from kronblocks import KronblocksError
from kronblocks.ops import BlockIndex, kron_linear, kron_weight, packed_linear, reference
from kronblocks.ops.operands import autocast
from kronblocks.ops.plans import PLAN_NAMES

SEED = torch.Generator().manual_seed(0)
X, COEFF, TILES, BIAS = (torch.randn(shape, generator=SEED) for shape in ((2, 15), (4, 3, 2), (2, 2, 3, 5), (12,)))
LIVE = torch.tensor([[1, 0, 1], [1, 1, 1], [0, 0, 0], [0, 1, 1]], dtype=torch.bool)
INDEX = BlockIndex.from_mask(LIVE)
VALUES = torch.randn(7, 3, 5, generator=SEED)


def call(
    plan="packed",
    *,
    x=X,
    coeff=COEFF,
    tiles=TILES,
    bias: torch.Tensor | None = BIAS,
    live: torch.Tensor | BlockIndex | None = LIVE,
):
    return kron_linear(x, coeff, tiles, bias, plan=plan, live=live)


@pytest.mark.parametrize("plan", PLAN_NAMES)
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.ones(2, 14)}, "x has 14 features, but 3 block columns of 5 need 15"),
        ({"x": torch.ones(14)}, "x has 14 features, but 3 block columns of 5 need 15"),
        ({"coeff": COEFF[0]}, r"coeff must be \(m1, n1, r\).*not \(3, 2\)"),
        ({"tiles": TILES[0]}, r"tiles \(g, r, bm, bn\), not .*\(2, 3, 5\)"),
        ({"coeff": torch.ones(4, 3, 3)}, "coeff has rank 3, but tiles have rank 2"),
        ({"tiles": torch.ones(3, 2, 3, 5)}, "3 groups of tiles do not divide 4 block rows"),
        ({"tiles": torch.ones(0, 2, 3, 5)}, "0 groups of tiles do not divide 4 block rows"),
        ({"bias": torch.ones(11)}, r"bias must be \(12,\), not \(11,\)"),
        ({"bias": torch.ones(1, 12)}, r"bias must be \(12,\), not \(1, 12\)"),
        ({"x": X.double()}, r"x is torch.float64, but coeff torch.float32.*\.to\(dtype\).*autocast"),
        ({"coeff": COEFF.bfloat16()}, r"coeff torch.bfloat16.*\.to\(dtype\).*autocast"),
        ({"tiles": TILES.double()}, r"tiles torch.float64.*\.to\(dtype\).*autocast"),
        ({"x": torch.ones(2, 15, dtype=torch.long)}, r"x is torch.int64.*\.to\(dtype\)"),
    ],
)
def test_refused(plan, changed, message):
    with pytest.raises(KronblocksError, match=message):
        call(plan, **changed)


@pytest.mark.parametrize("plan", PLAN_NAMES)
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        pytest.param({"live": LIVE[:1]}, "live", id="mask-of-one-row"),
        pytest.param({"live": LIVE[:, :1]}, "live", id="mask-of-one-column"),
        pytest.param({"live": LIVE.flatten()}, "live", id="flat-mask"),
        pytest.param({"live": LIVE.float()}, "live", id="float-mask"),
        pytest.param({"live": LIVE.int()}, "live", id="int-mask"),
        pytest.param({"bias": BIAS.double()}, "bias", id="bias-of-another-dtype"),
        pytest.param({"x": torch.tensor(1.0)}, "x", id="x-without-features"),
    ],
)
def test_refused_with_our_words(plan, changed, message):
    with pytest.raises(KronblocksError, match=message):
        call(plan, **changed)


@pytest.mark.parametrize("plan", ["", "Dense", "sparse", None, "auto"])
def test_unknown_plan(plan):
    with pytest.raises(KronblocksError, match=r"plan .* is unknown: write one of dense, tile_first, coeff_first, packed"):
        call(plan)


def test_packed_without_live():
    with pytest.raises(KronblocksError, match='plan "packed" multiplies live blocks only: give live='):
        call("packed", live=None)


@pytest.mark.parametrize("plan", [p for p in PLAN_NAMES if p != "packed"])
def test_only_packed_takes_an_index(plan):
    with pytest.raises(KronblocksError, match=f'plan "{plan}" takes live as an .* mask'):
        call(plan, live=INDEX)


@pytest.mark.parametrize("grid", [(2, 3), (8, 3)])
def test_packed_refuses_the_index_of_another_grid(grid):
    with pytest.raises(KronblocksError):
        call("packed", bias=None, live=BlockIndex.from_mask(torch.ones(grid, dtype=torch.bool)))


@pytest.mark.parametrize("position", [torch.arange(12), LIVE.flatten().nonzero().squeeze(1).flip(0)], ids=["padded", "reordered"])
def test_packed_from_factors_reads_any_index_rightly(position):
    index = BlockIndex.from_mask(LIVE, position)
    torch.testing.assert_close(call("packed", live=index), call("dense"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.ones(2, 14)}, "x has 14 features, but 3 block columns of 5 need 15"),
        ({"values": VALUES[0]}, r"values must be \(capacity, rows, cols\).*7, not \(3, 5\)"),
        ({"values": VALUES[:6]}, r"values must be .*capacity, 7, not \(6, 3, 5\)"),
        ({"x": X.double()}, "x is torch.float64, but values torch.float32: convert the model or the input.*torch.autocast"),
        ({"values": VALUES.bfloat16()}, "x is torch.float32, but values torch.bfloat16: convert"),
    ],
)
def test_packed_linear_refuses(changed, message):
    with pytest.raises(KronblocksError, match=message):
        packed_linear(**{"x": X, "values": VALUES, "index": INDEX, **changed})


@pytest.mark.parametrize(
    "bias", [torch.ones(1), torch.ones(5), torch.ones(2, 12), BIAS.double()], ids=lambda b: str(tuple(b.shape))
)
def test_packed_linear_refuses_bias(bias):
    with pytest.raises(KronblocksError, match="bias"):
        packed_linear(X, VALUES, INDEX, bias)


@pytest.mark.parametrize("plan", PLAN_NAMES)
def test_x_of_one_dimension(plan):
    y = call(plan, x=X[0])
    assert y.shape == (12,)
    assert torch.equal(y, call(plan, x=X[:1])[0])


@pytest.mark.parametrize("plan", PLAN_NAMES)
@pytest.mark.parametrize("groups", [1, 2])
def test_factors_of_any_strides(plan, groups, request):
    tiles = TILES[:groups]
    coeff, strided = (
        COEFF.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        tiles.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0),
    )
    assert not coeff.is_contiguous()
    assert not strided.is_contiguous()
    # the same sums, perhaps in another order: 31 products of size about 1 in fp32
    torch.testing.assert_close(call(plan, coeff=coeff, tiles=strided), call(plan, tiles=tiles), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plan", PLAN_NAMES)
def test_meta_tensors(plan):
    live = BlockIndex(*(t.to("meta") for t in INDEX)) if plan == "packed" else None
    tensors = [t.to("meta") for t in (X, COEFF, TILES, BIAS)]
    assert kron_linear(*tensors, plan=plan, live=live).shape == (2, 12)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_kron_weight(groups, rounding, with_gradients):
    tensors = torch.randn(4, 3, 2), torch.randn(groups, 2, 3, 5)
    dy = torch.randn(12, 15)
    # dtiles sums over the 12 blocks of the grid, dcoeff over the 15 weights of a block
    rounding(reference.kron_weight, tensors, dy, terms=15).check(with_gradients(kron_weight, tensors, dy))


@pytest.mark.parametrize(
    ("coeff", "tiles"), [(COEFF[0], TILES), (COEFF, TILES[0]), (COEFF[..., :1], TILES), (COEFF, torch.ones(3, 2, 3, 5))]
)
def test_kron_weight_refuses(coeff, tiles):
    with pytest.raises(KronblocksError):
        kron_weight(coeff, tiles)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("plan", PLAN_NAMES)
def test_autocast(plan, masked, rounding, with_gradients):
    """As the bf16 product of rounded inputs; parameters' gradients come in the parameters' dtype, and are those of bf16."""
    live = LIVE if masked or plan == "packed" else None
    tensors, dy = (X, COEFF, TILES[:1], BIAS), torch.randn(2, 12).bfloat16()

    def function(*t):
        with torch.autocast("cpu", torch.bfloat16):
            return kron_linear(*t, plan=plan, live=live)

    actual = with_gradients(function, tensors, dy)
    assert [t.dtype for t in actual] == [torch.bfloat16, *[torch.float32] * 4]
    rounded = [t.bfloat16() for t in tensors]
    rounding(lambda *t: reference.kron_linear(*t, live=live), rounded, dy, terms=60).check(actual)


def test_autocast_of_packed_linear(rounding, with_gradients):
    places = [divmod(int(k), 3) for k in LIVE.flatten().nonzero()]
    dy = torch.randn(2, 12).bfloat16()

    def function(x, values, bias):
        with torch.autocast("cpu", torch.bfloat16):
            return packed_linear(x, values, INDEX, bias)

    actual = with_gradients(function, (X, VALUES, BIAS), dy)
    assert [t.dtype for t in actual] == [torch.bfloat16, *[torch.float32] * 3]

    def oracle(x, values, bias):
        return x @ reference.packed_weight(values, places, (4, 3)).T + bias

    rounding(oracle, [t.bfloat16() for t in (X, VALUES, BIAS)], dy, terms=31).check(actual)


@pytest.mark.parametrize("plan", PLAN_NAMES)
def test_autocast_leaves_float64_alone_and_can_be_switched_off(plan):
    with torch.autocast("cpu", torch.bfloat16):
        doubles = kron_linear(X.double(), COEFF.double(), TILES.double(), BIAS.double(), plan=plan, live=LIVE)
        with torch.autocast("cpu", enabled=False):
            off = call(plan)
    assert doubles.dtype == torch.float64
    assert torch.equal(off, call(plan))


def test_autocast_helper_leaves_whole_numbers_and_none():
    with torch.autocast("cpu", torch.bfloat16):
        x, none, whole = autocast(X, None, torch.arange(3))
    assert (x.dtype, none, whole.dtype) == (torch.bfloat16, None, torch.int64)


@pytest.mark.parametrize("plan", PLAN_NAMES)
def test_backward_inside_autocast_of_a_forward_outside(plan, request):
    """nn.Linear allows it; the gradients are then computed in bf16 and cast."""
    x, coeff, tiles = (t.clone().requires_grad_() for t in (X, COEFF, TILES))
    y = call(plan, x=x, coeff=coeff, tiles=tiles)
    with torch.autocast("cpu", torch.bfloat16):
        y.sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in (x, coeff, tiles))
