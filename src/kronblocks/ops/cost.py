"""What each plan costs for a layer: counted exactly, and estimated in seconds.

The counts are exact for what the backends compute (equation 9 in docs/math.md). The estimate turns them into
time by a rough roofline: multiply-adds over a rate, plus bytes over a bandwidth. `ops/choice.py` chooses by it, or by timings.
"""

from __future__ import annotations

from dataclasses import dataclass

from kronblocks.errors import KronblocksError
from kronblocks.ops import backends
from kronblocks.ops.backends.triton.packed import fits
from kronblocks.ops.backends.triton.sizes import fit_on_chip
from kronblocks.ops.kron import PLAN_NAMES
from kronblocks.ops.precision import float32_products
from kronblocks.ops.problem import Problem


@dataclass(frozen=True)
class Cost:
    """Multiply-adds and bytes of one forward (and, in training, one backward) of a layer."""

    forward_macs: int
    backward_macs: int  # 0 unless training
    parameters: int  # values that are stored and trained, bias not counted
    parameter_bytes: int
    saved_bytes: int  # kept from forward to backward, x included, parameters not
    moved_bytes: int  # read or written in all, a rough count

    @property
    def macs(self) -> int:
        """Forward and backward multiply-adds."""
        return self.forward_macs + self.backward_macs


def _parameters(problem: Problem) -> int:
    grid, (m1, n1) = problem.grid, problem.grid.shape
    if problem.rank is None:
        return round(problem.density * grid.blocks) * grid.block.area
    return problem.rank * (m1 * n1 + problem.tile_groups * grid.block.area) + problem.gate * m1 * n1


def _stages(problem: Problem, plan: str) -> tuple[float, float, int]:
    """Multiply-adds of a plan's first and second stage, and the size of the intermediate between them (values)."""
    grid, rows, rank = problem.grid, problem.rows, problem.rank or 0
    (m1, n1), (bm, bn) = grid.shape, grid.block
    dense = rows * grid.weights
    live = round(problem.density * grid.blocks) * grid.block.area
    match plan:
        case "dense":
            return rank * grid.weights, dense, grid.weights
        case "packed":  # on factors the live blocks are built, and kept
            return rank * live, rows * live, live if rank else 0
        case "tile_first":
            size = rows * n1 * problem.tile_groups * rank * bm
            return size * bn, rows * live / bn * rank, size
        case "coeff_first":
            size = rows * m1 * rank * bn
            return rows * live / bm * rank, rows * m1 * rank * bm * bn, size
    raise KronblocksError(f"unknown plan {plan!r}: write one of {', '.join(PLAN_NAMES)}")


def cost(problem: Problem, plan: str) -> Cost:
    """Count one plan for one problem, dead blocks skipped (the PyTorch backend skips them in "packed" only).

    Raises:
        KronblocksError: the plan does not exist, or needs factors that a layer of free values has not got.

    >>> from kronblocks.blocks import BlockGrid, BlockSize
    >>> cost(Problem(BlockGrid(64, 64, BlockSize(16, 16)), rank=None, rows=10, density=0.25), "packed").forward_macs
    10240
    """
    if problem.rank is None and plan in ("tile_first", "coeff_first"):
        raise KronblocksError(f'plan "{plan}" works on factors; a layer of free block values has "dense" and "packed"')
    first, second, intermediate = _stages(problem, plan)
    grid, rows = problem.grid, problem.rows
    itemsize = problem.dtype.itemsize
    ends = rows * (grid.in_features + grid.out_features)
    if plan in ("dense", "packed"):
        # dvalues (or dW) is one product of the second stage's size, dx another; then dcoeff and dtiles. dense builds W again
        backward = second * (1 + problem.input_grad) + first * (3 if plan == "dense" else 2)
        # values are kept; W only for the dx of free values, since that of factors is built again
        built = intermediate if plan == "packed" or (problem.rank is None and problem.input_grad) else 0
        saved = rows * grid.in_features + built
    else:
        # the first stage again; two gradients of the second stage's size; dtiles or dcoeff, and dx, of the first's
        backward = 2 * second + first * (2 + problem.input_grad)
        saved = rows * grid.in_features
    # an einsum copies its operands into the layout of a matrix product: each use of the intermediate is about three passes
    passes = (3 * 4 if problem.training else 3) if plan.endswith("first") else (4 if problem.training else 2)
    parameters = _parameters(problem)
    moved = (ends * (3 if problem.training else 1) + parameters) * itemsize + intermediate_bytes(problem, plan) * passes
    return Cost(
        forward_macs=round(first + second),
        backward_macs=round(backward) if problem.training else 0,
        parameters=parameters,
        parameter_bytes=parameters * itemsize,
        saved_bytes=saved * itemsize if problem.training else 0,
        moved_bytes=moved,
    )


def _backend(problem: Problem) -> str:
    return backends.name(problem.device.split(":")[0], problem.dtype)


def intermediate_bytes(problem: Problem, plan: str) -> int:
    """Bytes of memory between a plan's two stages: the built W or blocks, or the first stage's result for all rows.

    The native kernels keep the latter in cache, and Triton's on chip, of tiles that fit there: 0.
    """
    backend = _backend(problem)
    fused = backend == "native" or (backend == "triton" and fit_on_chip(problem.grid.block))
    on_chip = plan.endswith("first") and fused
    return 0 if on_chip else _stages(problem, plan)[2] * problem.dtype.itemsize


# bytes per second inside and outside the cache; only ratios matter: 2 CPU cores, one large GPU
_BANDWIDTHS = {"cpu": (20e9, 8e9), "cuda": (4e12, 2e12)}
_CACHE_BYTES = 16e6
_PRODUCT_SECONDS = 2e-5  # to launch one of the small products of which the PyTorch backend's packed plan is made
_CALL_SECONDS = 5e-5  # of an operator of ours before it computes
_LAUNCHES_SECONDS = 1e-5  # of what a fused Triton plan launches beyond building W and multiplying
_LANES, _FEW_ROWS = 16, 4  # the native kernels' vectors hold so many rows of x, unless there are very few


def _dense_rate(problem: Problem) -> float:
    """Multiply-adds per second of a dense product: measured on 2 CPU cores; of a GPU's, about what an H100 is specified for."""
    if problem.device.split(":")[0] != "cuda":
        return 65e9
    if problem.dtype.itemsize == 2:
        return 300e12
    return 25e12 if float32_products() == "ieee" else 150e12


def _triton_efficiency(problem: Problem, plan: str) -> float:
    """The same of the Triton kernels, from what they load and the instructions they were compiled to: nothing is measured.

    float32 at full precision is three products on tensor cores, which dense products do not use at all. Products with blocks wait
    for the blocks' inputs, of which each number is used as often as a block is high.
    """
    full_precision = problem.dtype.itemsize > 2 and float32_products() == "ieee"
    smallest = min(problem.grid.block)
    if plan == "packed":
        if not fits(*problem.grid.block):
            return 0.9 * max(problem.density, 1e-3)  # W is built, and multiplied densely
        return min(1.5, smallest / 32) if full_precision else min(0.8, smallest / 150)
    density = max(problem.density, 1e-3)
    taken = 1 - (1 - density) ** 16  # of inputs: those that any of 16 outputs is alive with, if blocks died at random
    return (2.0 if full_precision else 0.6) * min(1.0, smallest / 4) * density / taken


def _efficiency(problem: Problem, plan: str) -> float:
    """Share of a dense product's rate that a plan's products reach (measured on 2 CPU cores)."""
    if plan == "dense":
        return 1.0
    backend = _backend(problem)
    if backend == "triton":
        return _triton_efficiency(problem, plan)
    if backend == "native":
        full = {"packed": 1.0, "coeff_first": 0.8, "tile_first": 0.6}[plan]
        few = plan != "packed" or (problem.rows <= _FEW_ROWS and not problem.training)
        return full if few else full * min(1.0, max(1, problem.rows) / _LANES)
    # PyTorch's packed plan is one thin product per block row: 0.03 at 4x4, 0.1 at 16x16
    return min(0.8, 0.006 * min(problem.grid.block)) if plan == "packed" else 0.6


def estimated_seconds(problem: Problem, plan: str) -> float:
    """Rough time of one step of the layer: good for comparing plans, not for promises."""
    cached, uncached = _BANDWIDTHS.get(problem.device.split(":")[0], _BANDWIDTHS["cpu"])
    counts = cost(problem, plan)
    bandwidth = cached if intermediate_bytes(problem, plan) < _CACHE_BYTES else uncached
    backend = _backend(problem)
    overhead = 0.0 if plan == "dense" and (backend != "triton" or problem.rank is None) else _CALL_SECONDS
    if backend == "triton" and plan.endswith("first"):
        overhead += _LAUNCHES_SECONDS
    if plan == "packed" and backend == "torch":
        overhead += (2 if problem.training else 1) * sum(problem.grid.shape) * _PRODUCT_SECONDS
    return counts.macs / (_dense_rate(problem) * _efficiency(problem, plan)) + counts.moved_bytes / bandwidth + overhead


def possible_plans(rank: int | None) -> tuple[str, ...]:
    """The plans that can compute a layer: all four on factors, dense and packed on free block values (rank None)."""
    return PLAN_NAMES if rank is not None else ("dense", "packed")


def check_plan(plan: str, rank: int | None) -> None:
    """Refuse a plan that cannot compute a layer.

    Raises:
        KronblocksError: the name is unknown, or the plan works on factors and the layer has free values.
    """
    allowed: tuple[str, ...] = ("auto", *possible_plans(rank))
    if plan not in allowed:
        reason = "works on factors, not on free block values" if plan in PLAN_NAMES else "is unknown"
        raise KronblocksError(f"plan {plan!r} {reason}: write one of {', '.join(allowed)}")
