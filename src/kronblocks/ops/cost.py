"""What each plan costs for a layer: counted exactly, and estimated in seconds.

The counts are exact for what the backends compute (equation 9 in docs/math.md). The estimate turns them into
time by a rough roofline: multiply-adds over a rate, plus bytes over a bandwidth. `ops/choice.py` chooses by it, or by timings.
"""

from __future__ import annotations

from dataclasses import dataclass

from kronblocks.ops import backends
from kronblocks.ops.backends.triton.packed import fits
from kronblocks.ops.backends.triton.sizes import fit_on_chip
from kronblocks.ops.plans import PLANS, Plan, plan_named
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
        return problem.live_blocks * grid.block.area
    return problem.rank * (m1 * n1 + problem.tile_groups * grid.block.area) + problem.gate * m1 * n1


def cost(problem: Problem, plan: str) -> Cost:
    """Count one plan for one problem, dead blocks skipped (the PyTorch backend skips them in "packed" only).

    Raises:
        KronblocksError: the plan does not exist, or needs factors that a layer of free values has not got.

    >>> from kronblocks.blocks import BlockGrid, BlockSize
    >>> cost(Problem(BlockGrid(64, 64, BlockSize(16, 16)), rank=None, rows=10, density=0.25), "packed").forward_macs
    10240
    """
    way = plan_named(plan, problem.rank)
    stages = way.stages(problem.sizes)
    grid, rows, itemsize = problem.grid, problem.rows, problem.dtype.itemsize
    ends = rows * (grid.in_features + grid.out_features)
    # blocks that were built are kept; W only for the dx of free values, since that of factors is built again
    keeps = way.keeps_blocks or (problem.rank is None and problem.input_grad)
    saved = rows * grid.in_features + (stages.between if keeps else 0)
    parameters = _parameters(problem)
    between = intermediate_bytes(problem, plan) * _passes(way, problem.training)
    moved = (ends * (3 if problem.training else 1) + parameters) * itemsize + between
    return Cost(
        forward_macs=stages.first + stages.second,
        backward_macs=way.backward_macs(stages, problem.input_grad) if problem.training else 0,
        parameters=parameters,
        parameter_bytes=parameters * itemsize,
        saved_bytes=saved * itemsize if problem.training else 0,
        moved_bytes=moved,
    )


_EINSUM_PASSES = 3  # over the intermediate at each use: an einsum reads it, and copies it into a matrix product's layout


def _passes(plan: Plan, training: bool) -> int:
    """How often the bytes between the stages are read or written.

    A factored intermediate is used once forward, and in training three more times: made again, and for two gradients. Built
    blocks are written and read once forward, and in training once more each.
    """
    if plan.is_factored:
        return (4 if training else 1) * _EINSUM_PASSES
    return 4 if training else 2


def _backend(problem: Problem) -> str:
    return backends.name(problem.device.split(":")[0], problem.dtype)


def intermediate_bytes(problem: Problem, plan: str) -> int:
    """Bytes of memory between a plan's two stages: the built W or blocks, or the first stage's result for all rows.

    The native kernels keep the latter in cache, and Triton's on chip, of tiles that fit there: 0.
    """
    backend = _backend(problem)
    fused = backend == "native" or (backend == "triton" and fit_on_chip(problem.grid.block))
    on_chip = PLANS[plan].is_factored and fused
    return 0 if on_chip else plan_named(plan, problem.rank).stages(problem.sizes).between * problem.dtype.itemsize


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
    if backend == "triton" and PLANS[plan].is_factored:
        overhead += _LAUNCHES_SECONDS
    if plan == "packed" and backend == "torch":
        overhead += (2 if problem.training else 1) * sum(problem.grid.shape) * _PRODUCT_SECONDS
    return counts.macs / (_dense_rate(problem) * _efficiency(problem, plan)) + counts.moved_bytes / bandwidth + overhead
