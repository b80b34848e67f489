"""`BlockSparseLinear`: made from dense and Kronecker layers, slots, compaction, torch's BSR layout."""

import pytest
import torch
from torch import nn

from kronblocks import BlockSparseLinear, KronblocksError, KroneckerBlockLinear

LIVE = torch.tensor([[1, 0, 1], [1, 1, 1], [0, 0, 0], [0, 1, 1]], dtype=torch.bool)
PLANS = ("dense", "packed")


def masked(linear: nn.Linear, mask: torch.Tensor = LIVE) -> torch.Tensor:
    return linear.weight.detach() * mask.repeat_interleave(3, 0).repeat_interleave(5, 1)


def slot_blocks(layer: BlockSparseLinear) -> list[int]:
    return layer.block_position.tolist()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("plan", PLANS)
def test_from_dense(plan, bias):
    linear = nn.Linear(15, 12, bias=bias)
    layer = BlockSparseLinear.from_dense(linear, block_size="3x5", mask=LIVE, plan=plan)
    assert torch.equal(layer.weight, masked(linear))
    assert layer.values.shape == (7, 3, 5)
    assert slot_blocks(layer) == LIVE.flatten().nonzero().flatten().tolist()
    assert (layer.bias is None) == (not bias)
    if layer.bias is not None:
        assert torch.equal(layer.bias, linear.bias)
        assert layer.bias is not linear.bias
    x = torch.randn(7, 15)
    # the same fp32 products, at most 16 of size about 1/4
    torch.testing.assert_close(layer(x), nn.functional.linear(x, masked(linear), linear.bias), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_from_dense_keeps_dtype_and_flag(dtype, training):
    linear = nn.Linear(15, 12, dtype=dtype).train(training)
    layer = BlockSparseLinear.from_dense(linear, block_size=(3, 5), mask=LIVE)
    assert layer.values.dtype == dtype
    assert layer.training == training
    assert layer.values.requires_grad


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("plan", PLANS)
def test_from_kron(plan, groups, gate, bias):
    """The lift leaves the function as it is, and the bias its parameter object (an optimiser knows it)."""
    kron = KroneckerBlockLinear(15, 12, "3x5", 2, tile_groups=groups, gate=gate, bias=bias, dtype=torch.float64).eval()
    if kron.gate is not None:
        nn.init.uniform_(kron.gate, -1, 1)
    kron.set_block_mask_(LIVE)
    kron.rows = 33
    layer = BlockSparseLinear.from_kron(kron, plan=plan)
    assert torch.equal(layer.weight, kron.weight)
    assert torch.equal(layer.block_mask, LIVE)
    assert layer.block_mask is not kron.block_mask
    assert layer.bias is kron.bias
    assert layer.capacity == 7
    assert (layer.rows, layer.training) == (33, False)
    x = torch.randn(7, 15, dtype=torch.float64)
    torch.testing.assert_close(layer(x), kron(x), rtol=1e-12, atol=1e-12)  # 31 products in float64
    assert layer.values.requires_grad


def test_initial_values():
    """nn.Linear's: uniform within 1/sqrt(n), also for values of a sparse layer."""
    layer = BlockSparseLinear(64, 48, 4)
    bound = 64**-0.5
    assert layer.values.detach().abs().max() <= bound
    # 3072 uniform draws of relative variance 1 +- 5*sqrt(0.8/3072)
    assert float(layer.values.detach().square().mean()) * 3 * 64 == pytest.approx(1, abs=0.081)
    assert layer.bias is not None
    assert layer.bias.detach().abs().max() <= bound


def test_mask_and_capacity():
    with pytest.raises(KronblocksError, match="give mask or capacity, not both"):
        BlockSparseLinear(15, 12, "3x5", mask=LIVE, capacity=7)
    for mask in (LIVE.float(), LIVE.t(), LIVE.flatten(), LIVE[None]):
        with pytest.raises(KronblocksError, match=r"mask must be bool of shape \(4, 3\)"):
            BlockSparseLinear(15, 12, "3x5", mask=mask)
        with pytest.raises(KronblocksError, match=r"mask must be bool of shape \(4, 3\)"):
            BlockSparseLinear.from_dense(nn.Linear(15, 12), block_size="3x5", mask=mask)
    for capacity in (-1, 13):
        with pytest.raises(KronblocksError, match=f"capacity must be from 0 to the 12 blocks of .*, not {capacity}"):
            BlockSparseLinear(15, 12, "3x5", capacity=capacity)
    for capacity in (0, 5, 12):
        layer = BlockSparseLinear(15, 12, "3x5", capacity=capacity)
        assert layer.capacity == capacity
        assert layer(torch.randn(2, 15)).shape == (2, 12)


@pytest.mark.parametrize("plan", PLANS)
def test_set_block_mask_needs_slots(plan):
    layer = BlockSparseLinear(15, 12, "3x5", mask=LIVE, plan=plan)
    with pytest.raises(KronblocksError, match=r"12 live blocks do not fit into the 7 slots .*from_dense\(linear"):
        layer.set_block_mask_(torch.ones_like(LIVE))
    assert torch.equal(layer.block_mask, LIVE), "nothing has changed"
    fewer = LIVE.clone()
    fewer[0, 0] = False
    layer.set_block_mask_(fewer)
    layer.set_block_mask_(LIVE)
    assert layer.block_norms()[0, 0] == 0


@pytest.mark.parametrize("plan", PLANS)
def test_compact(plan):
    """The same function from fewer slots; whoever holds state per slot learns which were kept."""
    layer = BlockSparseLinear(15, 12, "3x5", mask=LIVE, plan=plan)
    fewer = LIVE.clone()
    fewer[0, 0] = fewer[1] = False
    layer.set_block_mask_(fewer)
    x = torch.randn(7, 15)
    before, values, weight = layer(x).detach(), layer.values.detach().clone(), layer.weight.detach()
    layer(x).sum().backward()
    assert layer.values.grad is not None
    dead_slots = [slot for slot, block in enumerate(slot_blocks(layer)) if not fewer.flatten()[block]]
    assert dead_slots == [0, 2, 3, 4]
    assert (layer.values.grad[dead_slots] == 0).all()
    kept = layer.compact_()
    assert kept.tolist() == [1, 5, 6]
    assert layer.capacity == 3
    assert isinstance(layer.values, nn.Parameter)
    assert torch.equal(layer.values, values[kept])
    assert slot_blocks(layer) == [2, 10, 11]
    assert torch.equal(layer.weight.detach(), weight)
    torch.testing.assert_close(layer(x).detach(), before, rtol=1e-5, atol=1e-6)  # the same fp32 sums
    layer(x).sum().backward()
    assert layer.values.grad is not None
    assert (layer.values.grad.abs().sum((1, 2)) > 0).all()
    assert layer.compact_().tolist() == [0, 1, 2], "nothing more to give up"
    with pytest.raises(KronblocksError, match="4 live blocks do not fit into the 3 slots"):
        fewer[1, 1] = True
        layer.set_block_mask_(fewer)


def test_compact_keeps_frozen_values_frozen():
    layer = BlockSparseLinear(15, 12, "3x5", mask=LIVE)
    layer.values.requires_grad_(False)
    layer.compact_()
    assert not layer.values.requires_grad


@pytest.mark.parametrize("plan", PLANS)
def test_compact_to_nothing(plan):
    layer = BlockSparseLinear(15, 12, "3x5", mask=LIVE, plan=plan)
    layer.set_block_mask_(torch.zeros_like(LIVE))
    assert len(layer.compact_()) == layer.capacity == 0
    x = torch.randn(2, 15, requires_grad=True)
    y = layer(x)
    assert torch.equal(y, layer.bias.expand(2, 12))  # type: ignore[union-attr]
    y.sum().backward()
    assert x.grad is not None
    assert (x.grad == 0).all()


# torch warns that its BSR layout is in beta
@pytest.mark.filterwarnings("ignore:Sparse BSR tensor support:UserWarning")
@pytest.mark.parametrize("deaths", [False, True])
def test_to_torch_bsr(deaths):
    layer = BlockSparseLinear(15, 12, "3x5", mask=LIVE)
    if deaths:
        layer.scale_blocks_(torch.tensor([[0.0, 1, 1], [1, 2, 0], [1, 1, 1], [1, 1, 1]]))
    bsr = layer.to_torch_bsr()
    assert bsr.layout == torch.sparse_bsr
    assert bsr.values().shape == (5 if deaths else 7, 3, 5)
    assert torch.equal(bsr.to_dense(), layer.weight.detach())
    assert not bsr.requires_grad
    again = layer.weight.detach().to_sparse_bsr((3, 5))
    assert torch.equal(bsr.crow_indices(), again.crow_indices())
    assert torch.equal(bsr.col_indices(), again.col_indices())


@pytest.mark.filterwarnings("ignore:Sparse BSR tensor support:UserWarning")
def test_to_torch_bsr_is_detached_from_later_training():
    layer = BlockSparseLinear(15, 12, "3x5", mask=LIVE)
    before = layer.weight.detach()
    bsr = layer.to_torch_bsr()
    nn.init.zeros_(layer.values)
    assert torch.equal(bsr.to_dense(), before)


def test_slots_in_another_order():
    """A state_dict may list the blocks in any order; results do not depend on it."""
    layer, other = (BlockSparseLinear(15, 12, "3x5", mask=LIVE, plan="packed", dtype=torch.float64) for _ in range(2))
    order = torch.randperm(7)
    state = layer.state_dict()
    other.load_state_dict({**state, "values": state["values"][order], "block_position": state["block_position"][order]})
    assert torch.equal(layer.weight, other.weight)
    x = torch.randn(7, 15, dtype=torch.float64)
    torch.testing.assert_close(layer(x), other(x), rtol=1e-13, atol=1e-13)  # the same products in float64
    assert torch.equal(layer.block_norms(), other.block_norms())
    other.use_plan_("dense")
    torch.testing.assert_close(layer(x), other(x), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0, 3, 1]])
def test_the_weight_of_a_layer_without_dead_blocks(order):
    """It is no view of the values, which callers could write into; also where the values lie as the weight does."""
    layer = BlockSparseLinear(8, 8, 4, plan="dense").double()
    layer.block_position = torch.tensor(order)
    layer.refresh_index_()
    expected = torch.empty(2, 2, 4, 4, dtype=torch.float64)
    for slot, block in enumerate(order):
        expected[block // 2, block % 2] = layer.values[slot].detach()
    assert torch.equal(layer.dense_blocks(), expected)
    assert torch.equal(layer.dense_weight(), layer.grid.from_blocks(expected))
    whole = BlockSparseLinear(4, 4, 4)
    before = whole.values.detach().clone()
    whole.dense_weight().detach().zero_()
    assert torch.equal(whole.values, before)
