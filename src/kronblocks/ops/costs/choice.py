"""`choose_plan`: choose a plan by counted costs, or by timings of this machine."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from kronblocks.ops import backends
from kronblocks.ops.costs.counts import Cost, cost, estimated_seconds
from kronblocks.ops.costs.timing import INT8, REFERENCE, affordable, measure_int8
from kronblocks.ops.costs.timing_cache import Tables, timings
from kronblocks.ops.plans import possible_plans
from kronblocks.ops.problem import Problem


@dataclass(frozen=True)
class PlanChoice:
    """A chosen plan, its backend, the reason in words, every plan's cost, and timings if there are any."""

    plan: str
    backend: str
    why: str
    costs: Mapping[str, Cost] = field(repr=False)
    seconds: Mapping[str, float] | None = None  # measured, per step, also of `F.linear`; None: only estimated


def plan_seconds(problem: Problem, *, measure: bool, record: Tables | None = None) -> dict[str, float]:
    """Seconds per step of the candidate plans, measured or estimated; empty if nothing could be measured.

    Args:
        problem: the layer's product.
        measure: use timings of this machine, known or new, instead of estimates from the counts.
        record: gets the tables of timings that were used.
    """
    names = possible_plans(problem.rank)
    if not measure:
        return {plan: estimated_seconds(problem, plan) for plan in names}
    seconds = timings(problem, record)
    return {plan: seconds[plan] for plan in names if plan in seconds and affordable(problem, plan)}


def choose_plan(problem: Problem, *, measure: bool = False) -> PlanChoice:
    """The plan with the least time, and why.

    Args:
        problem: the layer's product.
        measure: False: estimate from the counts, which is the same everywhere. True: time the plans that the estimate does not
            rule out, or use known timings of this machine (`ops/costs/timing_cache.py`).

    >>> from kronblocks.core.blocks import BlockGrid, BlockSize
    >>> choose_plan(Problem(BlockGrid(1024, 1024, BlockSize(16, 16)), rank=1)).plan in ("tile_first", "coeff_first")
    True
    """
    plans = plan_seconds(problem, measure=True) if measure else {}
    if not plans:
        return _estimated(problem)
    best = min(plans, key=plans.__getitem__)
    seconds = {name: value for name, value in timings(problem).items() if name in (*plans, REFERENCE)}
    dense = f" against {milliseconds(seconds[REFERENCE])} for dense {REFERENCE}" if REFERENCE in seconds else ""
    others = ", ".join(f"{plan} {plans[plan] / plans[best]:.2f}x" for plan in plans if plan != best)
    why = (
        f"{best}: measured {milliseconds(plans[best])}{dense}, for {_about(problem)}; "
        f"{f'the others relative to it: {others}' if others else 'no other plan came near it by its counts'}"
    )
    return PlanChoice(best, _backend(problem), why, _costs(problem), MappingProxyType(seconds))


VALUES = "values"
"""The form of a finished factored layer whose live blocks are stored as free values, for packed products."""

_DEPLOY_GAIN = 1.05  # a block-sparse form is used only if it is this many times as fast as a plain weight, and int8 as all others
_FEW_ROWS, _FEW_ROWS_GAIN = 4, 1.25  # for up to so few rows, whose timings depend on the caches, this many times


@dataclass(frozen=True)
class DeployedForm:
    """How to store a finished layer, and the seconds of one inference in every form that was timed.

    Args:
        form: a plan that computes from what the layer stores. "values": compute free values of the live blocks from the
            factors. "dense": a plain `nn.Linear`, whose weight is built only once. "packed-int8": live blocks as int8.
        timed: seconds by form; empty if nothing could be timed.
    """

    form: str
    timed: Mapping[str, float]

    @property
    def seconds(self) -> float:
        """The time of the form itself; NaN if it could not be timed."""
        return self.timed.get(self.form, math.nan)


def choose_deployed(problem: Problem, *, int8: bool = False) -> DeployedForm:
    """The form in which to store a finished layer, by timings of this machine for inference.

    Args:
        problem: the layer's product.
        int8: live blocks may become int8.
    """
    timed = _deployed_forms(problem)
    if int8 and "dense" in timed:
        free = dataclasses.replace(problem, rank=None, tile_groups=1, gate=False, training=False)
        seconds = measure_int8(free)
        timed[INT8] = seconds[INT8] * timed["dense"] / seconds[REFERENCE]  # measured at another time: what counts is the ratio
    chosen = _fastest({form: seconds for form, seconds in timed.items() if form != INT8}, problem.rows)
    if INT8 in timed and timed[INT8] * _DEPLOY_GAIN < timed.get(chosen, math.inf):
        chosen = INT8
    return DeployedForm(chosen, timed)


def _fastest(timed: Mapping[str, float], rows: int) -> str:
    """The fastest of the forms that change no number; "dense" unless another one is clearly faster."""
    sparse = {form: seconds for form, seconds in timed.items() if form != "dense"}
    if not sparse or "dense" not in timed:
        return "dense"
    best = min(sparse, key=sparse.__getitem__)
    gain = _FEW_ROWS_GAIN if rows <= _FEW_ROWS else _DEPLOY_GAIN
    return best if sparse[best] * gain < timed["dense"] else "dense"


def _deployed_forms(problem: Problem) -> dict[str, float]:
    """Seconds of every form that a finished layer can have."""
    problem = dataclasses.replace(problem, training=False)
    forms = plan_seconds(problem, measure=True)
    reference = timings(problem).get(REFERENCE)
    if problem.rank is not None:
        free = dataclasses.replace(problem, rank=None, tile_groups=1, gate=False)
        values, beside = plan_seconds(free, measure=True), timings(free).get(REFERENCE)
        if "packed" in values:  # measured at another time: use its ratio to the F.linear of that time
            forms[VALUES] = values["packed"] * (reference / beside if reference and beside else 1.0)
    forms.pop("dense", None)
    return forms if reference is None else {**forms, "dense": reference}


def _estimated(problem: Problem) -> PlanChoice:
    seconds = plan_seconds(problem, measure=False)
    best = min(seconds, key=seconds.__getitem__)
    dense = max(1, problem.rows) * problem.grid.weights * (2 + problem.input_grad if problem.training else 1)
    costs = _costs(problem)
    others = ", ".join(f"{plan} {seconds[plan] / seconds[best]:.2f}x" for plan in seconds if plan != best)
    why = (
        f"{best}: {costs[best].macs / dense:.2f} of dense's multiply-adds for {_about(problem)}; "
        f"estimated time of the others relative to it: {others}"
    )
    return PlanChoice(best, _backend(problem), why, costs)


def _backend(problem: Problem) -> str:
    return backends.expected(problem.device, problem.dtype).name


def _costs(problem: Problem) -> Mapping[str, Cost]:
    return MappingProxyType({plan: cost(problem, plan) for plan in possible_plans(problem.rank)})


def _about(problem: Problem) -> str:
    return f"{problem.grid} at density {problem.density:.2f} and {problem.rows} rows"


def milliseconds(seconds: float) -> str:
    """A time as text.

    >>> milliseconds(0.00041), milliseconds(2.5)
    ('0.41 ms', '2.50 s')
    """
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.2f} s"
