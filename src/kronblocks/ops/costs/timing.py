"""Time one problem on this machine: seconds per step of every plan that could be the best one, and of `F.linear`.

Only plans with an estimated time near the least are run. They take turns, after warm-up, and drop out when they are clearly
slower. The caller's autocast, grad and inference modes do not matter, and torch's random state does not change.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from kronblocks.ops.convolution import packed_convolution
from kronblocks.ops.costs.counts import estimated_seconds, intermediate_bytes
from kronblocks.ops.index import BlockIndex
from kronblocks.ops.kron import kron_linear, kron_weight, packed_operands
from kronblocks.ops.packed import packed_linear
from kronblocks.ops.packed_int8 import packed_linear_int8, quantized_blocks
from kronblocks.ops.plans import PLANS, possible_plans
from kronblocks.ops.problem import Problem

REFERENCE = "F.linear"
"""The name of the plain dense layer of the same sizes, among the plans; in a convolution, that of torch's convolution."""

INT8 = "packed-int8"
"""The name of the product with int8 values on live blocks, beside the plans: it is only for finished layers."""

BUDGET = 0.15
"""Seconds after which a measurement ends, once every plan still in the running has had three turns."""

_NEAR = 5.0  # plans up to this many times the least estimate are timed: estimates are no better than that
_MOST_BYTES = 2**31  # of an intermediate: larger ones would not fit beside a model
_LEAST_ROWS = 256  # rows that are timed
_MOST_ROWS, _MOST_ROWS_ELSEWHERE = {"cpu": 4096}, 2**15  # more take longer in proportion, on a CPU; a GPU has to be filled
_MOST_MACS, _MOST_MACS_ELSEWHERE = {"cpu": 2e9}, 1e12  # of one dense product, so that a turn takes tens of milliseconds
_LARGE_IMAGE = 4  # times these rows: a larger image is cut
_LEAST_TURNS, _TURNS_TOGETHER, _MOST_TURNS = 3, 9, 100
_LONG = 0.03  # seconds: of a call that takes less, one turn decides nothing, since others may have used the cores
_SHORT = 5e-3  # seconds: a call that takes less is repeated in its turn, so that it finds its operands in the caches
_MOST_CALLS = 100  # of a turn, on a GPU, which computes one while the next ones are being launched

Runs = dict[str, Callable[[], object]]
Name = TypeVar("Name")


def affordable(problem: Problem, plan: str) -> bool:
    """Whether a plan's intermediate, for all the problem's rows, fits the memory limit."""
    return not PLANS[plan].is_factored or intermediate_bytes(problem, plan) <= _MOST_BYTES


def candidates(problem: Problem) -> tuple[str, ...]:
    """The plans worth timing: affordable, and not estimated to be far slower than the best."""
    seconds = {plan: estimated_seconds(problem, plan) for plan in possible_plans(problem.rank) if affordable(problem, plan)}
    least = min(seconds.values())
    always = ("dense",) if problem.device_type != "cpu" else ()  # estimates for a GPU were never compared with one
    return tuple(plan for plan, value in seconds.items() if value <= _NEAR * least or plan in always)


def measured_rows(problem: Problem) -> int:
    """How many rows are timed instead of the problem's number."""
    return as_measured(problem).rows


def as_measured(problem: Problem) -> Problem:
    """What is timed instead of the problem: fewer rows; in a convolution, fewer whole images, or rows of a very large one."""
    most = _MOST_MACS.get(problem.device, _MOST_MACS_ELSEWHERE) / problem.grid.weights
    limit = min(_MOST_ROWS.get(problem.device, _MOST_ROWS_ELSEWHERE), max(_LEAST_ROWS, 2 ** int(most).bit_length()))
    around = problem.convolution
    if around is None or around.size is None:
        return dataclasses.replace(problem, rows=max(1, min(problem.rows, limit)))
    height, width = around.size
    height = min(height, max(1, _LARGE_IMAGE * limit // width))
    images = max(1, min(problem.images, limit // (height * width)))
    return dataclasses.replace(problem, rows=images * height * width, convolution=around._replace(size=(height, width)))


def measure(problem: Problem) -> dict[str, float]:
    """Time the candidate plans of a problem, and `F.linear`, on random operands with a random mask of its density.

    A step is a forward, and in training a backward too: gradients of the weights, the bias, and x if the problem says so.

    Returns:
        Seconds per step for all of the problem's rows. A plan that ran out of the device's memory is missing.
    """
    few = as_measured(problem)
    with _plain(few):
        calls = 1 if few.device == "cpu" else _MOST_CALLS
        seconds = _interleaved(_runs(few), _synchronizer(few.device), calls)
    return {name: value * max(1, problem.rows) / few.rows for name, value in seconds.items()}


def measure_int8(problem: Problem) -> dict[str, float]:
    """Time an inference with int8 values (`INT8`), and `F.linear` in turns with it, as `measure` does.

    Args:
        problem: of free values and for inference.
    """
    few = dataclasses.replace(problem, rows=measured_rows(problem), training=False)
    with _plain(few):
        calls = 1 if few.device == "cpu" else _MOST_CALLS
        seconds = _interleaved(_runs(few, int8=True), _synchronizer(few.device), calls)
    return {name: value * max(1, problem.rows) / few.rows for name, value in seconds.items()}


def measure_together(problems: Sequence[Problem]) -> tuple[list[float], list[dict[str, list[float]]]]:
    """Time the candidate plans of several problems of one layer beside one `F.linear`, all in turns.

    So all plans are measured under the same load of the machine. A plan that is four times slower than `F.linear` in the first
    turn has no further turns.

    Args:
        problems: of one shape, rows, dtype, device, and all of training or all of inference; at least one.

    Returns:
        Seconds per step for all rows, turn by turn, of `F.linear` and of each problem's plans. A plan that ran out of the
        device's memory is missing.
    """
    few = [as_measured(problem) for problem in problems]
    device, calls = few[0].device, 1 if few[0].device == "cpu" else _MOST_CALLS
    with _plain(few[0]):
        runs: dict[tuple[int, str], Callable[[], object]] = {}
        for number, problem in enumerate(few):
            own = _runs(problem)
            runs |= {(number, name): run for name, run in own.items() if number == 0 or name != REFERENCE}
        synchronize = _synchronizer(device)
        running = _that_fit(runs, synchronize)
        taken: dict[tuple[int, str], list[float]] = {name: [] for name in running}
        end = time.perf_counter() + BUDGET * len(problems)
        for turn in range(1, _MOST_TURNS + 1):
            for name in running:
                taken[name].append(_turn(runs[name], synchronize, calls))
            if turn == 1 and (0, REFERENCE) in taken:
                running = [name for name in running if taken[name][0] <= 4 * taken[0, REFERENCE][0]]
            if turn >= _TURNS_TOGETHER and time.perf_counter() > end:
                break
    scale = max(1, problems[0].rows) / few[0].rows
    seconds = {name: [scale * value for value in values] for name, values in taken.items()}
    reference = seconds.pop((0, REFERENCE), [])
    return reference, [{plan: seconds[n, plan] for n, plan in seconds if n == number} for number in range(len(problems))]


@contextlib.contextmanager
def _plain(problem: Problem) -> Iterator[None]:
    """Set the modes for timing, whatever the caller's are: that may be an optimiser's hook or an inference."""
    device = problem.device.split(":")[0]
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(problem.training))
        if torch.amp.is_autocast_available(device):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _synchronizer(device: str) -> Callable[[], None]:
    return (lambda: None) if device == "cpu" else (lambda: torch.accelerator.synchronize(torch.device(device)))


def _runs(problem: Problem, *, int8: bool = False) -> Runs:
    """One step of every candidate, or of the product with int8 values, ready to be called."""
    grid, ((m1, n1), (bm, bn)) = problem.grid, (problem.grid.shape, problem.grid.block)
    generator = torch.Generator(problem.device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=problem.device, dtype=problem.dtype)

    live = max(1, round(problem.density * grid.blocks))
    mask = torch.zeros(grid.blocks, dtype=torch.bool, device=problem.device)
    mask[torch.randperm(grid.blocks, generator=generator, device=problem.device)[:live]] = True
    position, mask = mask.nonzero().squeeze(1), mask.view(m1, n1)
    index = BlockIndex.from_mask(mask)
    rows, columns = (problem.rows, grid.in_features), (problem.rows, grid.out_features)
    around = problem.convolution
    if around is not None and around.size is not None:
        rows = (problem.images, grid.in_features // around.geometry.positions, *around.image_size)
        columns = (problem.images, grid.out_features, *around.size)
    x, dy, bias = random(*rows), random(*columns), random(grid.out_features)
    x.requires_grad_(problem.training and problem.input_grad)
    reference = random(grid.out_features, grid.in_features)

    def dense(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear(x, weight, bias) if around is None else around.convolve(x, weight, bias)

    def with_weight(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return dense(x, weight if around is None else around.kernel(weight), bias)

    def with_blocks(x: Tensor, values: Tensor, index: BlockIndex, bias: Tensor) -> Tensor:
        return packed_linear(x, values, index, bias) if around is None else packed_convolution(x, values, index, bias, around)

    def factored(plan: str) -> Callable[..., Tensor]:
        if around is None:
            live = index if PLANS[plan].needs_live else mask
            return lambda x, coeff, tiles, bias: kron_linear(x, coeff, tiles, bias, plan=plan, live=live)
        if PLANS[plan].is_factored:
            over = around.over_patches
            return lambda x, *factors: over(x, lambda rows: kron_linear(rows, *factors, plan=plan, live=mask))
        if PLANS[plan].needs_live:
            return lambda x, coeff, tiles, bias: with_blocks(x, *packed_operands(coeff, tiles, index), bias)
        return lambda x, coeff, tiles, bias: with_weight(x, kron_weight(coeff.masked_fill(~mask.unsqueeze(-1), 0), tiles), bias)

    def packed(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return with_blocks(x, values, index, bias)

    def unpacked(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        blocks = values if live == grid.blocks else values.new_zeros(grid.blocks, bm, bn).index_copy(0, position, values)
        blocks = blocks.unflatten(0, (m1, n1))
        return dense(x, grid.from_blocks(blocks) if around is None else around.kernel_of(blocks), bias)

    def step(function: Callable[..., Tensor], *weights: Tensor) -> Callable[[], object]:
        operands = (x, *(weight.detach().requires_grad_(problem.training) for weight in (*weights, bias)))
        if not problem.training:
            return lambda: function(*operands)
        wanted = [each for each in operands if each.requires_grad]
        return lambda: torch.autograd.grad(function(*operands), wanted, dy)

    runs = {REFERENCE: step(dense, reference if around is None else around.kernel(reference))}
    if int8:
        values, scales = quantized_blocks(random(live, bm, bn), index.row, m1)

        def in_int8(rows: Tensor) -> Tensor:
            return packed_linear_int8(rows, values, scales, index, bias)

        return runs | {INT8: lambda: in_int8(x) if around is None else around.over_patches(x, in_int8)}
    if problem.rank is None:
        values = random(live, bm, bn)
        functions: dict[str, Callable[..., Tensor]] = {"packed": packed, "dense": unpacked}
        return runs | {plan: step(functions[plan], values) for plan in candidates(problem)}
    factors = random(m1, n1, problem.rank), random(problem.tile_groups, problem.rank, bm, bn)
    return runs | {plan: step(factored(plan), *factors) for plan in candidates(problem)}


def _once(run: Callable[[], object], synchronize: Callable[[], None], calls: int = 1) -> float:
    """Seconds per call."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    synchronize()
    return (time.perf_counter() - start) / calls


def _turn(run: Callable[[], object], synchronize: Callable[[], None], most_calls: int) -> float:
    """Seconds per call, over as many calls as fill a turn, after a call that warms the caches."""
    first = _once(run, synchronize)
    return first if first > _SHORT else _once(run, synchronize, min(most_calls, 1 + int(_SHORT / first)))


def _that_fit(runs: dict[Name, Callable[[], object]], synchronize: Callable[[], None]) -> list[Name]:
    """The runs that fit into memory. Each is run once here, so that loading libraries is not timed."""
    fitting = []
    for name, run in runs.items():
        with contextlib.suppress(torch.OutOfMemoryError):
            _once(run, synchronize)
            fitting.append(name)
    return fitting


def _interleaved(runs: Runs, synchronize: Callable[[], None], most_calls: int = 1) -> dict[str, float]:
    """The least seconds of each run, taking turns. Runs that are clearly slower than the best drop out.

    The least counts, since other work of the machine can only add time. A turn of a short run has several calls, up to
    `most_calls`, before it waits for the device: as in a training, where launches go on while it computes.
    """
    running = _that_fit(runs, synchronize)
    taken: dict[str, list[float]] = {name: [] for name in running}
    end = time.perf_counter() + BUDGET
    for turn in range(1, _MOST_TURNS + 1):
        for name in running:
            taken[name].append(_turn(runs[name], synchronize, most_calls))
        best = min(min(values) for values in taken.values() if values)
        limit = max(3.0 * best, _LONG) if turn == 1 else 1.5 * best
        running = [name for name in running if min(taken[name]) <= limit or (name == REFERENCE and turn < _LEAST_TURNS)]
        if turn >= _LEAST_TURNS and time.perf_counter() > end:
            break
    return {name: min(values) for name, values in taken.items() if values}
