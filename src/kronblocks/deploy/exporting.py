"""Export a finished model: each block layer in the form that runs fastest (dense, packed, factored or BSR), and checked."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from kronblocks.algorithms.training.sparsifier import Sparsifier
from kronblocks.core.checks import number, one_of
from kronblocks.core.errors import KronblocksError
from kronblocks.core.hooks import rows_reaching
from kronblocks.deploy.cards import note_scores
from kronblocks.deploy.entry import RESIZED
from kronblocks.deploy.exported import Exported, ExportedLayer
from kronblocks.deploy.outputs import arguments, call, call_or_refuse, difference, tensors
from kronblocks.deploy.quantizing import ROOM, checked_rounding
from kronblocks.deploy.slimming import remove_dead_features_
from kronblocks.nn.base import BlockLayer
from kronblocks.nn.block_sparse_linear import BlockSparseLinear
from kronblocks.nn.bsr_linear import BsrLinear
from kronblocks.nn.kron_linear import KroneckerBlockLinear
from kronblocks.nn.quantized_block_linear import QuantizedBlockLinear
from kronblocks.nn.unfolded import Unfolded, UnfoldedConv
from kronblocks.ops.costs.choice import VALUES, DeployedForm, choose_deployed, milliseconds, plan_seconds
from kronblocks.ops.costs.timing import INT8
from kronblocks.ops.packed_int8 import MOST_INPUTS
from kronblocks.ops.plans import PLANS
from kronblocks.surgery.replace import bare, evaluating, replace_
from kronblocks.surgery.sparsify import pack_masked_
from kronblocks.surgery.start import plain_linear

Form = Literal["auto", "dense", "packed", "packed-int8", "factored", "bsr"]
Precision = Literal["same", "int8"]


def export(
    model: nn.Module,
    example: Tensor | tuple[Any, ...] | Mapping[str, Any],
    *,
    form: Form = "auto",
    precision: Precision = "same",
    slim: bool = True,
    sparsifier: Sparsifier | None = None,
    tolerance: float | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
) -> Exported:
    """Copy a finished model, with each block layer in the form that is fastest for inference, and check the copy.

    Args:
        model: trained; it stays unchanged.
        example: the model's input: a tensor, a tuple of arguments, or a dict of keyword arguments. Forms are timed with its
            number of rows.
        form: "auto": the fastest for each layer, timed on this machine. Or one for all: "dense" (nn.Linear), "packed" (live
            blocks), "packed-int8" (live blocks as whole numbers of 8 bits), "factored" (Kronecker factors; layers of free values
            are packed) or "bsr" (torch's block-sparse layout).
        precision: "int8": "auto" may choose "packed-int8", which changes outputs, where it is fastest.
        slim: remove features between two layers that are constant or unread (see `kronblocks.deploy.slimming`), if
            `torch.export` can trace the model.
        sparsifier: for methods on plain nn.Linear, to pack the layers that it masks.
        tolerance: how far outputs may differ, relative to the largest; None: 1e-4, or four roundings of a lower precision, and
            twice the sum of the differences that int8 layers make on their own.
        evaluate: a number for a model in eval mode, such as its accuracy on held-out data. It is computed for the model and for
            the copy, and printed.

    Returns:
        The copy, the form of each layer, the difference, and what `evaluate` says.

    Raises:
        KronblocksError: there is no block layer, outputs differ by more than the tolerance, or a layer with int8 values differs
            from its float layer by more than rounding explains (equation 23 in docs/math.md).

    >>> model = nn.Sequential(BlockSparseLinear(32, 16, 4, mask=torch.eye(4, 8).bool()), nn.ReLU())
    >>> exported = export(model, torch.randn(5, 32), form="dense")
    >>> exported.model
    Sequential(
      (0): Linear(in_features=32, out_features=16, bias=True)
      (1): ReLU()
    )
    >>> exported.layers[0].form, exported.error < 1e-6
    ('dense', True)
    """
    one_of("form", form, Form)
    one_of("precision", precision, Precision)
    if precision == "int8" and form not in ("auto", INT8):
        raise KronblocksError(f"precision='int8' is for form='auto' or 'packed-int8', not {form!r}: omit one of the two")
    if tolerance is not None:
        number("tolerance", tolerance, 0, float("inf"), "a share of the largest output, from 0 on")
    with evaluating(model):
        expected = list(tensors(call_or_refuse(model, example)))
        score = None if evaluate is None else _score(evaluate, model)
        new = copy.deepcopy(bare(model)).requires_grad_(False)
    if not expected:
        raise KronblocksError("the model returns no floating-point tensors for the example, so the copy cannot be checked")
    if sparsifier is not None:
        pack_masked_(new, bare(model), sparsifier)
    if isinstance(new, BlockLayer):
        new = nn.Sequential(new)
    names = [name for name, module in new.named_modules() if isinstance(module, BlockLayer)]
    if not names:
        raise KronblocksError(
            "the model has no block layer to export: give the model that sparsify_ made, and sparsifier= if its method works "
            "on plain nn.Linear"
        )
    slimmed, remark = remove_dead_features_(new, *arguments(example)) if slim else ([], "")
    with rows_reaching({name: new.get_submodule(name) for name in names}) as rows:
        call(new, example)
    floats: dict[str, BlockSparseLinear] = {}
    wanted = _Wanted(form, precision == "int8")
    layers = [_export_layer(new, name, calls[-1] if calls else (0,), wanted, floats) for name, calls in rows.items()]
    with checked_rounding(new, floats) as rounding:
        error = difference(list(tensors(call(new, example))), expected)
    layers = tuple(dataclasses.replace(layer, rounding=rounding.get(layer.name)) for layer in layers)
    allowed = _tolerance(new, expected) + ROOM * sum(rounding.values()) if tolerance is None else tolerance
    if not error <= allowed:
        raise KronblocksError(
            f"the exported model's outputs differ by {error:.1e} of the largest output, more than tolerance={allowed:.2g}. "
            "Check that the model in eval mode gives equal outputs at every call. If its precision explains the difference, "
            "write a larger tolerance="
        )
    scores = None if evaluate is None or score is None else (score, _score(evaluate, new))
    setattr(new, RESIZED, [name for each in slimmed for name in (each.producer, each.consumer)])
    if scores is not None:
        note_scores(new, dict(zip(("evaluated, before export", "evaluated"), scores, strict=True)))
    return Exported(new, layers, tuple(slimmed), remark, error, scores)


def _score(evaluate: Callable[[nn.Module], float], model: nn.Module) -> float:
    with torch.no_grad():
        found: Any = evaluate(model)
    try:
        return float(found)
    except (TypeError, ValueError) as error:
        raise KronblocksError(f"evaluate returned {type(found).__name__}, not a number: return a float") from error


def _tolerance(model: nn.Module, outputs: list[Tensor]) -> float:
    """How far a copy may differ by rounding in the lowest precision of the model's weights and outputs."""
    dtypes = {tensor.dtype for tensor in (*model.parameters(), *outputs) if tensor.is_floating_point()}
    return max(1e-4, *(4 * torch.finfo(dtype).eps for dtype in dtypes))


class _Wanted(NamedTuple):
    form: Form
    int8: bool  # "auto" may choose it


class _Chosen(NamedTuple):
    form: str
    plan: str
    why: str
    timed: Mapping[str, float] = MappingProxyType({})


def _choose(layer: BlockLayer, rows: int, wanted: _Wanted) -> _Chosen:
    factored, form = layer.rank is not None, wanted.form
    fits = layer.in_features <= MOST_INPUTS
    if form != "auto":
        if form == "factored" and not factored:
            return _Chosen("packed", "packed", "asked for; it has no factors")
        if form == INT8 and not fits:
            return _Chosen("packed", "packed", f"asked for; more than {MOST_INPUTS:,} inputs")
        return _Chosen(form, _best_factored(layer, rows) if form == "factored" else "packed", "asked for")
    if not rows:
        return _Chosen("packed", "packed", "the example does not reach it")
    choice = choose_deployed(layer.problem(rows=rows, training=False), int8=wanted.int8 and fits)
    plan, timed, why = choice.form, choice.timed, f"at {rows} rows {_times(choice)}"
    if plan in ("dense", INT8):
        return _Chosen(plan, plan, why, timed)
    if factored and _is_factored(plan):
        return _Chosen("factored", plan, f"{why}; {plan}", timed)
    how = "; live blocks computed from the factors" if plan == VALUES else ""
    return _Chosen("packed", "packed", why + how, timed)


def _times(choice: DeployedForm) -> str:
    """The time of a form, and those of the others."""
    others = {form: seconds for form, seconds in choice.timed.items() if form != choice.form}
    if choice.form not in choice.timed or not others:
        return "no other form came near it by the counts"
    other = "dense" if "dense" in others else min(others, key=others.__getitem__)
    return f"{milliseconds(choice.seconds)}, {other} {milliseconds(others[other])}"


def _best_factored(layer: BlockLayer, rows: int) -> str:
    seconds = plan_seconds(layer.problem(rows=rows or None, training=False), measure=False)
    return min(filter(_is_factored, seconds), key=seconds.__getitem__)


def _is_factored(form: str) -> bool:
    return form in PLANS and PLANS[form].is_factored


@torch.no_grad()
def _export_layer(
    model: nn.Module, name: str, seen: tuple[int, ...], wanted: _Wanted, floats: dict[str, BlockSparseLinear]
) -> ExportedLayer:
    """Replace a layer; `floats` gets the float layer of one with int8 values."""
    old, rows = model.get_submodule(name), math.prod(seen)
    assert isinstance(old, BlockLayer)
    if old.convolution is not None and len(seen) == 3:
        old.convolution = old.convolution._replace(size=(seen[1], seen[2]))
    around = model.get_submodule(name.rpartition(".")[0])
    if isinstance(around, UnfoldedConv):  # int8 values multiply copies of patches, whose time is not known
        wanted = wanted._replace(int8=False)
    chosen = _choose(old, rows, wanted)
    new = _in_form(old, chosen).eval().requires_grad_(False)
    if chosen.form == INT8:
        assert isinstance(new, BlockSparseLinear)
        floats[name], new = new, QuantizedBlockLinear.from_packed(new).eval()
    replace_(model, name, new)
    if isinstance(around, Unfolded) and chosen.form == "dense":
        replace_(model, name.rpartition(".")[0], around.folded())
    stored = sum(t.numel() * t.element_size() for t in new.state_dict().values())
    size, grid = (old.out_features, old.in_features), old.grid
    return ExportedLayer(name, chosen.form, *size, str(grid.block), old.density, rows, stored, chosen.why, dict(chosen.timed))


def _in_form(layer: BlockLayer, chosen: _Chosen) -> nn.Module:
    if chosen.form == "dense":
        return plain_linear(layer)
    if chosen.form == "factored":
        assert isinstance(layer, KroneckerBlockLinear)
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
