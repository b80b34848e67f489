"""The forms that a finished block layer can have, which of them is fastest alone, and the layer in that form."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
from torch import nn

from kronblocks.nn.base import BlockLayer
from kronblocks.nn.block_sparse_linear import BlockSparseLinear
from kronblocks.nn.bsr_linear import BsrLinear
from kronblocks.nn.kron_linear import KroneckerBlockLinear
from kronblocks.ops.costs.choice import VALUES, DeployedForm, choose_deployed, milliseconds, plan_seconds
from kronblocks.ops.costs.timing import INT8
from kronblocks.ops.packed_int8 import MOST_INPUTS
from kronblocks.ops.plans import PLANS
from kronblocks.surgery.start import plain_linear

Form = Literal["auto", "dense", "packed", "packed-int8", "factored", "bsr"]
Precision = Literal["same", "int8"]


class Wanted(NamedTuple):
    """What the user asks for."""

    form: Form
    int8: bool  # "auto" may choose it


class Chosen(NamedTuple):
    """The form of a layer."""

    form: str
    plan: str
    why: str
    timed: Mapping[str, float] = MappingProxyType({})

    @property
    def key(self) -> str:
        """A word for the form that also says how factors are multiplied."""
        return self.plan if self.form == "factored" else self.form


class Call(NamedTuple):
    """The input of a layer in one example."""

    shape: tuple[int, ...]  # of x without its features
    weight: float  # how often it is called

    @property
    def rows(self) -> int:
        """Rows of x."""
        return math.prod(self.shape)


def choose(layer: BlockLayer, calls: Sequence[Call], wanted: Wanted) -> Chosen:
    """The form that is asked for, or the fastest one of this layer alone.

    Args:
        layer: finished.
        calls: at least one; of no rows if the example does not reach the layer.
        wanted: form and precision.
    """
    factored, form, fits = layer.rank is not None, wanted.form, layer.in_features <= MOST_INPUTS
    reaching = [call for call in calls if call.rows]
    rows = max((call.rows for call in reaching), default=0)
    if form != "auto":
        if form == "factored" and not factored:
            return Chosen("packed", "packed", "asked for; it has no factors")
        if form == INT8 and not fits:
            return Chosen("packed", "packed", f"asked for; more than {MOST_INPUTS:,} inputs")
        return Chosen(form, _best_factored(layer, rows) if form == "factored" else "packed", "asked for")
    if not reaching:
        return Chosen("packed", "packed", "the example does not reach it")
    choice = _together(layer, reaching, wanted.int8 and fits)
    plan, timed = choice.form, choice.timed
    why = f"at {' and '.join(str(each) for each in dict.fromkeys(call.rows for call in reaching))} rows {_times(choice)}"
    if plan in ("dense", INT8):
        return Chosen(plan, plan, why, timed)
    if factored and is_factored(plan):
        return Chosen("factored", plan, f"{why}; {plan}", timed)
    how = "; live blocks computed from the factors" if plan == VALUES else ""
    return Chosen("packed", "packed", why + how, timed)


def _together(layer: BlockLayer, calls: Sequence[Call], int8: bool) -> DeployedForm:
    """The choice for one call; for several, the form with the least time of all."""
    choices = [choose_deployed(layer.problem(rows=call.rows, training=False), int8=int8) for call in calls]
    if len({call.rows for call in calls}) == 1:
        return choices[0]
    weights, forms = [call.weight for call in calls], set.intersection(*(set(choice.timed) for choice in choices))
    timed = {form: sum(w * choice.timed[form] for w, choice in zip(weights, choices, strict=True)) for form in sorted(forms)}
    return DeployedForm(min(timed, key=timed.__getitem__), timed) if timed else choices[0]


def possible(layer: BlockLayer, chosen: Chosen, calls: Sequence[Call], wanted: Wanted) -> dict[str, Chosen]:
    """All forms for whole models to try, by `Chosen.key`: the one chosen for the layer alone, dense, packed, and others."""
    found = {chosen.key: chosen}
    found |= {form: Chosen(form, form, "", chosen.timed) for form in ("dense", "packed") if form not in found}
    if wanted.int8 and layer.in_features <= MOST_INPUTS and INT8 not in found:
        found[INT8] = Chosen(INT8, INT8, "", chosen.timed)
    if layer.rank is not None:
        rows = max((call.rows for call in calls), default=0)
        for plan in (as_it_was(layer), _best_factored(layer, rows)):
            if is_factored(plan) and plan not in found:
                found[plan] = Chosen("factored", plan, "", chosen.timed)
    return found


def as_it_was(layer: BlockLayer) -> str:
    """The form, by its key, that computes as the layer does now, or in the same way with a weight that is built once."""
    return layer.active_plan


def _times(choice: DeployedForm) -> str:
    """The time of a form, and those of the others."""
    others = {form: seconds for form, seconds in choice.timed.items() if form != choice.form}
    if choice.form not in choice.timed or not others:
        return "no other form came near it by the counts"
    other = "dense" if "dense" in others else min(others, key=others.__getitem__)
    return f"{milliseconds(choice.seconds)}, {other} {milliseconds(others[other])}"


def _best_factored(layer: BlockLayer, rows: int) -> str:
    seconds = plan_seconds(layer.problem(rows=rows or None, training=False), measure=False)
    return min(filter(is_factored, seconds), key=seconds.__getitem__)


def is_factored(form: str) -> bool:
    """Whether a form computes from factors."""
    return form in PLANS and PLANS[form].is_factored


@torch.no_grad()
def in_form(layer: BlockLayer, chosen: Chosen) -> nn.Module:
    """The layer in a form that is not int8. The layer itself may be used up for it, unless it has factors."""
    if chosen.form == "dense":
        return plain_linear(layer)
    if chosen.form == "factored":
        assert isinstance(layer, KroneckerBlockLinear)
        layer = copy.deepcopy(layer)
        if layer.gate is not None:
            layer.coeff.copy_(layer.effective_coeff())
            layer.gate = None
        layer.plan = chosen.plan
        layer.use_plan_(chosen.plan)
        return layer
    packed = BlockSparseLinear.from_kron(layer) if isinstance(layer, KroneckerBlockLinear) else layer
    assert isinstance(packed, BlockSparseLinear)
    packed.compact_()
    if chosen.form == "bsr":
        return BsrLinear.from_block_sparse(packed)
    packed.plan = "packed"
    packed.use_plan_("packed")
    return packed
