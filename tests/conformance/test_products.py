"""Every plan x backend x dtype x shape x mask against the reference in float64: output and every gradient."""

import functools
import itertools
from typing import NamedTuple

import pytest
import torch
from tests.conformance.backends import BACKENDS, in_dtypes, over

from kronblocks.ops import reference
from kronblocks.ops.index import BlockIndex
from kronblocks.ops.kron import kron_linear
from kronblocks.ops.packed import packed_linear
from kronblocks.ops.plans import PLAN_NAMES


class Case(NamedTuple):
    grid: tuple[int, int]
    block: tuple[int, int]
    rank: int = 2
    groups: int = 1
    leading: tuple[int, ...] = (6,)
    layout: str = "plain"


CASES = {
    "rectangular": Case((4, 3), (3, 5)),
    "prime-grid": Case((5, 7), (2, 3), rank=3, leading=(11,)),
    "some-groups": Case((6, 2), (2, 5), groups=3),
    "own-tiles": Case((5, 3), (4, 2), groups=5, leading=(7,)),
    "rank-1": Case((2, 3), (4, 5), rank=1, leading=(5,)),
    "rank-1-groups": Case((4, 3), (3, 2), rank=1, groups=2),
    "rank-above-area": Case((3, 4), (1, 2), rank=5),
    "single-weights": Case((3, 4), (1, 1)),
    "one-block": Case((1, 1), (3, 4)),
    "one-block-column": Case((4, 1), (2, 3), groups=2),
    "one-block-row": Case((1, 5), (2, 3), rank=3),
    "tall-blocks": Case((2, 5), (3, 1)),
    "flat-blocks": Case((5, 2), (1, 4), groups=5),
    "tensor-cores": Case((3, 2), (16, 20), groups=3, leading=(9,)),
    "larger": Case((8, 6), (4, 4), rank=4, groups=2, leading=(33,)),
    "no-rows": Case((4, 3), (3, 5), groups=2, leading=(0,)),
    "one-row": Case((4, 3), (3, 5), groups=2, leading=(1,)),
}
# leading dimensions and strides of x are settled before an operator sees it, whatever the mask, the dtype and the order of slots
LAYOUTS = {
    "3d": Case((4, 3), (3, 5), groups=2, leading=(2, 3)),
    "3d-empty": Case((4, 3), (3, 5), leading=(2, 0)),
    "4d": Case((3, 2), (2, 3), leading=(2, 1, 3)),
    "3d-permuted": Case((4, 3), (3, 5), groups=2, leading=(2, 3), layout="permuted"),
    "transposed": Case((4, 3), (3, 5), layout="permuted"),
    "strided": Case((4, 3), (3, 5), groups=4, layout="strided"),
    "expanded": Case((4, 3), (3, 5), layout="expanded"),
}
MASKS = ("none", "some-dead", "one-live", "all-dead", "all-live")


def laid_out(shape: tuple[int, ...], layout: str, **factory) -> torch.Tensor:
    """Random values, in memory as the case wants them."""
    match layout:
        case "permuted":
            x = torch.randn(shape[::-1], **factory).permute(*reversed(range(len(shape))))
        case "strided":
            x = torch.randn(*shape[:-1], 2 * shape[-1], **factory)[..., ::2]
        case "expanded":
            x = torch.randn(1, *shape[1:], **factory).expand(shape)
        case _:
            return torch.randn(shape, **factory)
    assert not x.is_contiguous()
    return x


def mask_of(kind: str, grid: tuple[int, int]) -> torch.Tensor:
    """(m1, n1) bool; "some-dead" has both kinds wherever there are two blocks."""
    p, q = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    match kind:
        case "some-dead":
            return (p + 2 * q) % 3 != 1
        case "one-live":
            return (p == grid[0] - 1) & (q == 0)
        case "all-dead":
            return torch.zeros(grid, dtype=torch.bool)
    return torch.ones(grid, dtype=torch.bool)


def products(case: Case, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """x, coeff, tiles, bias, dy. Coefficients of dead blocks are not zero: operators must not rely on it."""
    (m1, n1), (bm, bn) = case.grid, case.block
    factory = {"dtype": dtype, "device": device}
    x = laid_out((*case.leading, n1 * bn), case.layout, **factory)
    shapes = ((m1, n1, case.rank), (case.groups, case.rank, bm, bn), (m1 * bm,))
    dy = laid_out((*case.leading, m1 * bm), case.layout, **factory)
    return [x, *(torch.randn(shape, **factory) for shape in shapes), dy]


def longest_sum(case: Case) -> int:
    """Products in the longest sum among y, dx, dcoeff, dtiles and dbias."""
    (m1, n1), (bm, bn) = case.grid, case.block
    rows = max(1, torch.Size(case.leading).numel())
    return max(n1 * bn * case.rank + 1, m1 * bm * case.rank, rows * bm * bn, rows * m1 * n1)


# packed without a mask is an error: tests/ops/test_kron.py
PLANS_AND_MASKS = [(plan, mask) for plan in PLAN_NAMES for mask in MASKS if (plan, mask) != ("packed", "none")]
WHOLE = [(case, *rest) for case in CASES for rest in PLANS_AND_MASKS]
PART = [
    (case, *rest) for case in ("some-groups", "no-rows") for rest in PLANS_AND_MASKS if rest[1] not in ("one-live", "all-live")
]


def check_kron_linear(case: Case, dtype: torch.dtype, device: str, plan: str, mask: str, rounding, with_gradients) -> None:
    *tensors, dy = products(case, dtype, device)
    live = None if mask == "none" else mask_of(mask, case.grid).to(device)
    actual = with_gradients(lambda *t: kron_linear(*t, plan=plan, live=live), tensors, dy)
    assert all(t.dtype == dtype for t in actual)
    rounding(lambda *t: reference.kron_linear(*t, live=live), tensors, dy, terms=longest_sum(case)).check(actual)
    if live is not None:
        assert (actual[2][~live] == 0).all(), "gradients of dead blocks' coefficients are exactly 0"


@pytest.mark.parametrize(("backend", "dtype", "case", "plan", "mask"), in_dtypes(WHOLE, PART), indirect=["backend"])
def test_kron_linear(backend, dtype, case, plan, mask, rounding, with_gradients):
    check_kron_linear(CASES[case], dtype, backend.device, plan, mask, rounding, with_gradients)


@pytest.mark.parametrize(
    ("backend", "case", "plan"),
    over(itertools.product(LAYOUTS, PLAN_NAMES), [("strided", plan) for plan in PLAN_NAMES]),
    indirect=["backend"],
)
def test_kron_linear_of_any_layout(backend, case, plan, rounding, with_gradients):
    check_kron_linear(LAYOUTS[case], torch.float32, backend.device, plan, "some-dead", rounding, with_gradients)


@pytest.mark.parametrize("backend", [b.parameter() for b in BACKENDS if torch.bfloat16 in b.dtypes], indirect=True)
def test_packed_groups_in_bf16(backend, with_gradients):
    """2048 blocks that each add 1 to the gradient: 2048 in every plan that accumulates in fp32."""
    live = torch.ones(64, 64, dtype=torch.bool, device=backend.device)
    x, coeff, tiles = (torch.ones(s, dtype=torch.bfloat16, device=backend.device) for s in ((1, 64), (64, 64, 1), (2, 1, 1, 1)))
    dy = torch.ones(1, 64, dtype=torch.bfloat16, device=backend.device)
    functions = [functools.partial(kron_linear, plan=plan, live=live) for plan in PLAN_NAMES]
    dtiles = [with_gradients(function, (x, coeff, tiles), dy)[3] for function in functions]
    assert [d.flatten().tolist() for d in dtiles] == [[2048.0, 2048.0]] * 4


@pytest.mark.parametrize("plan", PLAN_NAMES)
def test_kron_linear_without_bias(backend, plan, rounding, with_gradients):
    x, coeff, tiles, _, dy = products(CASES["some-groups"], torch.float32, backend.device)
    live = mask_of("some-dead", (6, 2)).to(backend.device)
    actual = with_gradients(lambda *t: kron_linear(*t, plan=plan, live=live), (x, coeff, tiles), dy)
    rounding(lambda *t: reference.kron_linear(*t, live=live), (x, coeff, tiles), dy, terms=100).check(actual)


@pytest.mark.parametrize("mask", MASKS[1:])
@pytest.mark.parametrize("case", ("rectangular", "some-groups", "own-tiles", "larger"))
def test_packed_takes_an_index_for_the_mask(backend, case, mask, with_gradients):
    """The same bits, since the mask is turned into the same index."""
    *tensors, dy = products(CASES[case], torch.float32, backend.device)
    live = mask_of(mask, CASES[case].grid).to(backend.device)
    index = BlockIndex.from_mask(live)
    by_mask, by_index = (
        with_gradients(lambda *t, where=where: kron_linear(*t, plan="packed", live=where), tensors, dy) for where in (live, index)
    )
    assert all(torch.equal(a, b) for a, b in zip(by_mask, by_index, strict=True))


def slots(kind: str, live: torch.Tensor) -> torch.Tensor | None:
    """Positions for `BlockIndex.from_mask`: the live blocks, or also dead ones, in order or not."""
    match kind:
        case "exact":
            return None
        case "with-dead":
            return torch.arange(live.numel())
        case "shuffled":
            return torch.randperm(live.numel())
    raise AssertionError(kind)


KINDS = ("exact", "with-dead", "shuffled")


def check_packed_linear(case: Case, dtype: torch.dtype, device: str, mask: str, kind: str, rounding, with_gradients) -> None:
    x, _, _, bias, dy = products(case, dtype, device)
    live = mask_of(mask, case.grid)
    position = slots(kind, live)
    index = BlockIndex(*(t.to(device) for t in BlockIndex.from_mask(live, position)))
    position = live.flatten().nonzero().squeeze(1) if position is None else position
    values = torch.randn(len(position), *case.block).to(dtype).to(device)
    listed = [k for k, at in enumerate(position.tolist()) if live.flatten()[at]]
    places = [divmod(int(position[k]), case.grid[1]) for k in listed]

    def oracle(x, values, bias):
        weight = reference.packed_weight(values[listed], places, case.grid)
        return x @ weight.T + bias

    actual = with_gradients(lambda x, values, bias: packed_linear(x, values, index, bias), (x, values, bias), dy)
    assert all(t.dtype == dtype for t in actual)
    rounding(oracle, (x, values, bias), dy, terms=longest_sum(case)).check(actual)
    unlisted = torch.ones(len(position), dtype=torch.bool).index_fill(0, torch.tensor(listed, dtype=torch.long), False)
    assert (actual[2][unlisted] == 0).all(), "slots that the index does not list get a gradient of exactly 0"
    without_bias = with_gradients(lambda x, values: packed_linear(x, values, index), (x, values), dy)
    rounding(lambda x, values: oracle(x, values, 0), (x, values), dy, terms=longest_sum(case)).check(without_bias)


@pytest.mark.parametrize(
    ("backend", "dtype", "case", "mask", "kind"),
    in_dtypes(
        itertools.product(CASES, MASKS[1:], KINDS),
        itertools.product(("some-groups", "tensor-cores"), ("some-dead", "all-dead"), ("shuffled",)),
    ),
    indirect=["backend"],
)
def test_packed_linear(backend, dtype, case, mask, kind, rounding, with_gradients):
    check_packed_linear(CASES[case], dtype, backend.device, mask, kind, rounding, with_gradients)


@pytest.mark.parametrize(("backend", "case"), over(((case,) for case in LAYOUTS), [("3d-permuted",)]), indirect=["backend"])
def test_packed_linear_of_any_layout(backend, case, rounding, with_gradients):
    check_packed_linear(LAYOUTS[case], torch.float32, backend.device, "some-dead", "shuffled", rounding, with_gradients)
