"""`BlockIndex`: rows, columns, starts, slots and the transposed order agree with the mask, with and without positions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kronblocks import KronblocksError
from kronblocks.ops import BlockIndex


@st.composite
def masks(draw) -> torch.Tensor:
    m1, n1 = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    return torch.tensor(draw(st.lists(st.booleans(), min_size=m1 * n1, max_size=m1 * n1))).view(m1, n1)


@st.composite
def masks_and_positions(draw) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots for every live block and for some dead ones, in any order."""
    mask = draw(masks())
    flat = mask.flatten().tolist()
    kept = [k for k, live in enumerate(flat) if live or draw(st.booleans())]
    return mask, torch.tensor(draw(st.permutations(kept)), dtype=torch.long)


def check(index: BlockIndex, mask: torch.Tensor, position: torch.Tensor) -> None:
    """Everything that an index says, against the mask by plain loops; `position` is each slot's block."""
    (m1, n1), capacity = mask.shape, len(position)
    live = [(p, q) for p in range(m1) for q in range(n1) if mask[p, q]]
    count = len(live)
    assert index.grid == (m1, n1)
    assert all(t.dtype == torch.int32 for t in index)
    assert [len(t) for t in index] == [m1 + 1, capacity, capacity, capacity, n1 + 1, capacity]
    rows, cols = index.row.tolist(), index.col.tolist()
    # the first entries are the live blocks, row by row
    assert list(zip(rows, cols, strict=True))[:count] == live
    assert index.crow.tolist() == [sum(p < row for p, _ in live) for row in range(m1 + 1)]
    # the slot of an entry holds that entry's block, and no two entries share one
    slots = index.slot.tolist()[:count]
    assert [divmod(int(position[slot]), n1) for slot in slots] == live
    assert len(set(slots)) == count
    # `order` lists each entry once, column by column, and rows ascend within a column
    order = index.order.tolist()[:count]
    assert sorted(order) == list(range(count))
    assert [(cols[k], rows[k]) for k in order] == sorted((q, p) for p, q in live)
    assert index.ccol.tolist() == [sum(q < column for _, q in live) for column in range(n1 + 1)]
    # padding is valid to index with
    for tensor, size in zip((index.col, index.row, index.slot, index.order), (n1, m1, capacity, capacity), strict=True):
        assert all(0 <= k < size for k in tensor.tolist())


def dense_mask(index: BlockIndex) -> torch.Tensor:
    mask = torch.zeros(index.grid, dtype=torch.bool)
    live = int(index.crow[-1])
    mask[index.row[:live].long(), index.col[:live].long()] = True
    return mask


@given(masks())
def test_without_positions(mask):
    index = BlockIndex.from_mask(mask)
    check(index, mask, mask.flatten().nonzero().squeeze(1))
    assert index.slot.tolist() == list(range(int(mask.sum())))
    assert torch.equal(dense_mask(index), mask)


@given(masks_and_positions())
def test_with_positions(given_both):
    mask, position = given_both
    index = BlockIndex.from_mask(mask, position)
    check(index, mask, position)
    assert torch.equal(dense_mask(index), mask)


@given(masks_and_positions(), st.data())
def test_deaths_only_shorten(given_both, data):
    """The shapes stay, no live count grows, and the blocks that live on keep their slots."""
    mask, position = given_both
    survivors = mask & torch.tensor(data.draw(st.lists(st.booleans(), min_size=mask.numel(), max_size=mask.numel()))).view(
        mask.shape
    )
    before, after = BlockIndex.from_mask(mask, position), BlockIndex.from_mask(survivors, position)
    check(after, survivors, position)
    assert [t.shape for t in before] == [t.shape for t in after]
    assert (after.crow <= before.crow).all()
    assert (after.ccol <= before.ccol).all()

    def homes(index: BlockIndex) -> dict[tuple[int, int], int]:
        live = int(index.crow[-1])
        return {(p, q): s for p, q, s in zip(*(t.tolist()[:live] for t in (index.row, index.col, index.slot)), strict=True)}

    assert homes(after).items() <= homes(before).items()


def test_the_mask_of_another_layout():
    mask = torch.tensor([[True, False, True], [False, True, True]])
    for strided in (mask.t().contiguous().t(), mask.repeat_interleave(2, 1)[:, ::2]):
        assert not strided.is_contiguous()
        check(BlockIndex.from_mask(strided), mask, mask.flatten().nonzero().squeeze(1))


def test_a_live_block_without_a_slot_is_refused():
    with pytest.raises(KronblocksError, match="slot"):
        BlockIndex.from_mask(torch.ones(2, 2, dtype=torch.bool), torch.tensor([0, 3]))
