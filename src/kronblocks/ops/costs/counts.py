"""Exact counts of what each plan costs for a layer, and estimates of its time.

The counts are those of what the backends compute (equation 9 in docs/math.md). The estimate is a rough roofline: multiply-adds
over a rate, plus bytes over a bandwidth, plus the overhead of calls. The backend knows which share of a dense product's rate
a plan reaches. `ops/costs/choice.py` chooses by these estimates, or by timings.
"""

from __future__ import annotations

from dataclasses import dataclass

from kronblocks.ops import backends
from kronblocks.ops.plans import DENSE, PACKED, Plan, plan_named
from kronblocks.ops.precision import float32_products
from kronblocks.ops.problem import Problem


@dataclass(frozen=True)
class Cost:
    """Multiply-adds and bytes of one forward (and, in training, one backward) of a layer."""

    forward_macs: int
    backward_macs: int  # 0 unless training
    parameters: int  # values that are stored and trained, without the bias
    parameter_bytes: int
    saved_bytes: int  # kept from forward to backward, with x, without parameters
    moved_bytes: int  # read or written in total, a rough count

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
        KronblocksError: the plan does not exist, or needs factors, which a layer of free values does not have.

    >>> from kronblocks.core.blocks import BlockGrid, BlockSize
    >>> cost(Problem(BlockGrid(64, 64, BlockSize(16, 16)), rank=None, rows=10, density=0.25), "packed").forward_macs
    10240
    """
    way = plan_named(plan, problem.rank)
    stages = way.stages(problem.sizes)
    grid, rows, itemsize = problem.grid, problem.rows, problem.dtype.itemsize
    inputs, copied = _inputs(problem, way)
    ends = rows * (inputs + grid.out_features) + copied
    # blocks that were built are kept; W only for the dx of free values, since that of factors is built again
    keeps = way.keeps_blocks or (problem.rank is None and problem.input_grad)
    saved = rows * inputs + (stages.between if keeps else 0)
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


def _inputs(problem: Problem, plan: Plan) -> tuple[int, int]:
    """How many inputs each row has of its own, and how many are copied first: in a convolution these are patches, or pixels."""
    around, features = problem.convolution, problem.grid.in_features
    if around is None:
        return features, 0
    if plan is not DENSE and plan is not PACKED:
        return features, problem.rows * features
    height, width = around.image_size
    pixels = max(1, features // around.geometry.positions * height * width // around.positions)
    in_place = plan is DENSE or around.stride == (1, 1)
    return pixels, 0 if in_place else problem.rows * pixels


_EINSUM_PASSES = 3  # over the intermediate at each use: an einsum reads it, and copies it into a matrix product's layout


def _passes(plan: Plan, training: bool) -> int:
    """How often the bytes between the stages are read or written.

    Forward uses a factored intermediate once. Training uses it three more times: it is computed again, and used for two
    gradients. Built blocks are written and read once in forward, and once more each in training.
    """
    if plan.is_factored:
        return (4 if training else 1) * _EINSUM_PASSES
    return 4 if training else 2


def intermediate_bytes(problem: Problem, plan: str) -> int:
    """Bytes of a plan's intermediate: the built W or blocks, or the first stage's result for all rows.

    0 if the backend keeps it on chip.
    """
    way = plan_named(plan, problem.rank)
    on_chip = backends.expected(problem.device, problem.dtype).keeps_on_chip(problem, way)
    return 0 if on_chip else way.stages(problem.sizes).between * problem.dtype.itemsize


# Bytes per second inside and outside the cache; only ratios matter: 2 CPU cores, one large GPU
_BANDWIDTHS = {"cpu": (20e9, 8e9), "cuda": (4e12, 2e12)}
_CACHE_BYTES = 16e6  # smaller intermediates are assumed to stay in the cache
# Multiply-adds per second of a dense product: measured on 2 CPU cores; for a GPU about 60% of an H100's specification, and 75% of
# that for float32
_CPU_RATE = 65e9
_GPU_HALF_RATE, _GPU_TF32_RATE, _GPU_FLOAT32_RATE = 300e12, 150e12, 25e12


def _dense_rate(problem: Problem) -> float:
    """Multiply-adds per second of a dense product."""
    if problem.device_type != "cuda":
        return _CPU_RATE
    if problem.dtype.itemsize == 2:
        return _GPU_HALF_RATE
    return _GPU_FLOAT32_RATE if float32_products() == "ieee" else _GPU_TF32_RATE


def estimated_seconds(problem: Problem, plan: str) -> float:
    """Rough time of one step of the layer: good for comparing plans, not for promises."""
    backend, way = backends.expected(problem.device, problem.dtype), plan_named(plan, problem.rank)
    cached, uncached = _BANDWIDTHS.get(problem.device_type, _BANDWIDTHS["cpu"])
    counts = cost(problem, plan)
    bandwidth = cached if intermediate_bytes(problem, plan) < _CACHE_BYTES else uncached
    rate = _dense_rate(problem) * (1.0 if way is DENSE else backend.efficiency(problem, way))
    return counts.macs / rate + counts.moved_bytes / bandwidth + backend.call_seconds(problem, way)
