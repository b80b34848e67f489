"""The ways of computing one layer that are timed together, and which plan "auto" takes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kronblocks import BlockSparseLinear, KroneckerBlockLinear
from kronblocks.nn.base import BlockLayer
from kronblocks.ops import BlockGrid, choose_plan, cost
from kronblocks_lab.bench.cases import peers

DENSE, FASTKRON = "dense", "pyfastkron"
FORWARD, BOTH = "forward", "forward+backward"
PEERS: dict[str, Callable[[Tensor, Tensor, BlockGrid], peers.Product]] = {
    "torch BSR F.linear": peers.bsr_linear,
    "torch BSR W @ x.T": peers.bsr_product,
    "SciPy BSR": peers.scipy_bsr,
}
AUTHORS: dict[str, type[peers.AuthorsLayer]] = {
    "authors build W": peers.BuildWeight,
    "authors two products": peers.TwoProducts,
    "authors loop": peers.LoopOverTerms,
}


@dataclass(frozen=True)
class Case:
    """One way of computing a layer.

    `source` is the layer whose weight it multiplies with; `trained` are the parameters of a case that can be trained.
    """

    name: str
    run: Callable[[Tensor], Tensor]
    source: nn.Module
    macs: int  # of a forward pass
    parameters: int  # numbers that it reads as the weight
    backward_macs: int = 0
    trained: nn.Module | None = None
    rank: int | None = None
    tile_groups: str | None = None
    plan: str | None = None


def random_mask(grid: BlockGrid, density: float, generator: torch.Generator) -> Tensor:
    """(m1, n1) bool with exactly round(density * blocks) live blocks, at least one."""
    live = max(1, round(density * grid.blocks))
    mask = torch.zeros(grid.blocks, dtype=torch.bool)
    mask[torch.randperm(grid.blocks, generator=generator)[:live]] = True
    return mask.view(grid.shape)


def auto_plan_(layer: BlockLayer, rows: int, *, training: bool) -> str:
    """Let "auto" choose by timings for this many rows; returns the plan that the layer computes with from now on."""
    layer.use_plan_(choose_plan(layer.problem(rows=rows, training=training), measure=True).plan)
    return layer.active_plan


def layer_case(name: str, layer: BlockLayer, plan: str, rows: int) -> Case:
    """A copy of a layer with a fixed plan."""
    own = copy.deepcopy(layer)
    own.use_plan_(plan)
    groups = None if layer.rank is None else ("1" if layer.tile_groups == 1 else "per-row")
    counts = cost(layer.problem(rows=rows), plan)
    macs = (counts.forward_macs, counts.backward_macs)
    return Case(f"{name} {plan}", own, layer, macs[0], counts.parameters, macs[1], own, layer.rank, groups, plan)


def plans_of(layer: BlockLayer) -> tuple[str, ...]:
    """The fixed plans worth timing: packed where blocks are dead (always for free values), tile-first with one bank of tiles."""
    if layer.rank is None:
        return "packed", "dense"
    plans = ["dense", "coeff_first"]
    if layer.tile_groups == 1:
        plans.append("tile_first")
    if not bool(layer.block_mask.all()):
        plans.append("packed")
    return tuple(plans)


def dense_case(grid: BlockGrid, rows: int, device: str, dtype: torch.dtype = torch.float32) -> Case:
    """`nn.Linear`, what all others are compared with."""
    linear = nn.Linear(grid.in_features, grid.out_features, device=device, dtype=dtype)
    macs = rows * grid.weights
    return Case(DENSE, linear, linear, macs, grid.weights, 2 * macs, linear)


def dynamic_int8(model: nn.Module) -> nn.Module | None:
    """PyTorch's own int8 form of a model's linear layers for a CPU; None where this build has none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
        except (RuntimeError, AttributeError):
            return None


def values_layer(grid: BlockGrid, mask: Tensor, device: str, dtype: torch.dtype = torch.float32) -> BlockSparseLinear:
    """Free values on the live blocks of a mask."""
    return BlockSparseLinear(grid.in_features, grid.out_features, grid.block, mask=mask, device=device, dtype=dtype)


def factors_layer(
    grid: BlockGrid, mask: Tensor, rank: int, per_row: bool, device: str, dtype: torch.dtype = torch.float32
) -> KroneckerBlockLinear:
    """Factors with dead blocks."""
    groups = grid.shape[0] if per_row else 1
    sides = grid.in_features, grid.out_features
    layer = KroneckerBlockLinear(*sides, grid.block, rank, tile_groups=groups, device=device, dtype=dtype)
    layer.set_block_mask_(mask.to(device))
    return layer


def factors_name(rank: int, per_row: bool) -> str:
    """What a factored layer is called in the results."""
    return f"factors r={rank}{' per-row' if per_row else ''}"


def compiled_case(case: Case) -> Case:
    """The same under torch.compile."""
    assert case.trained is not None
    return replace(case, name=f"{case.name}, compiled", run=torch.compile(case.trained, dynamic=False))


def authors_cases(layer: KroneckerBlockLinear, rows: int) -> Iterator[Case]:
    """The paper's layer as its authors write it, in all ways."""
    assert layer.rank is not None
    for name, form in AUTHORS.items():
        module = form(layer)
        macs = peers.authors_macs(form, layer.grid, layer.rank, rows)
        stored = module.s.numel() + module.a.numel() + module.b.numel()
        yield Case(f"{name} r={layer.rank}", module, module, macs, stored, 2 * macs, module, layer.rank, "1")


@torch.no_grad()
def peer_cases(layer: BlockSparseLinear, rows: int) -> tuple[list[Case], dict[str, str]]:
    """Other libraries' block-sparse products with a layer's weight, and why some of them cannot compute it."""
    cases, reasons = [], {}
    live = int(layer.block_mask.sum()) * layer.grid.block.area
    assert layer.bias is not None
    weight, bias = layer.dense_weight(), layer.bias.detach()
    x = weight.new_zeros(rows, layer.grid.in_features)
    for name, make in PEERS.items():
        try:
            product = make(weight, bias, layer.grid)
            peers.tried(product, x)
            cases.append(Case(name, product, layer, rows * live, live))
        except peers.Unavailable as error:
            reasons[name] = str(error)
    return cases, reasons


def fastkron_cases(layer: KroneckerBlockLinear, rows: int) -> tuple[list[Case], dict[str, str]]:
    """pyfastkron's product with a layer of rank 1, or why there is none. It multiplies with the tile first."""
    try:
        macs = peers.authors_macs(peers.TwoProducts, layer.grid, 1, rows)
        stored = layer.coeff.numel() + layer.tiles.numel()
        return [Case(FASTKRON, peers.fastkron(layer), layer, macs, stored, rank=1, tile_groups="1")], {}
    except peers.Unavailable as error:
        return [], {FASTKRON: str(error)}
