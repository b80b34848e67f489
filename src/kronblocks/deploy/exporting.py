"""Export a finished model: block layers in the forms with which the whole model runs fastest, and checked."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kronblocks.algorithms.training.planning import measuring_allowed
from kronblocks.algorithms.training.sparsifier import Sparsifier
from kronblocks.core.checks import number, one_of
from kronblocks.core.errors import KronblocksError
from kronblocks.core.hooks import rows_reaching
from kronblocks.deploy import judging
from kronblocks.deploy.cards import note_scores
from kronblocks.deploy.entry import RESIZED
from kronblocks.deploy.exported import Exported, ExportedLayer, Whole
from kronblocks.deploy.forms import Call, Chosen, Form, Precision, Wanted, choose, in_form, possible
from kronblocks.deploy.outputs import arguments, call, call_or_refuse, difference, tensors
from kronblocks.deploy.quantizing import ROOM, checked_rounding
from kronblocks.deploy.slimming import Slimmed, remove_dead_features_
from kronblocks.deploy.wholes import Place, Stage, kind_of
from kronblocks.nn.base import BlockLayer
from kronblocks.nn.block_sparse_linear import BlockSparseLinear
from kronblocks.nn.quantized_block_linear import QuantizedBlockLinear
from kronblocks.nn.unfolded import Unfolded, UnfoldedConv
from kronblocks.ops.costs.timing import INT8
from kronblocks.surgery.replace import bare, evaluating, replace_
from kronblocks.surgery.sparsify import pack_masked_


def export(
    model: nn.Module,
    example: Any = None,
    *,
    form: Form = "auto",
    precision: Precision = "same",
    slim: bool = True,
    sparsifier: Sparsifier | None = None,
    tolerance: float | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    phases: Mapping[str, Any] | None = None,
    weights: Mapping[str, float] | None = None,
    budget: float = judging.BUDGET,
    progress: Callable[[str], None] | None = None,
) -> Exported:
    """Copy a finished model, with its block layers in the forms that are fastest for inference, and check the copy.

    With form="auto", each layer is timed alone first. Then whole models are timed in turns: with these forms, all packed, all
    dense, as the model was, and with the forms of equal layers switched. The fastest whole wins. If the model is compiled, the
    first four are compiled too, and no forms are switched.

    Args:
        model: trained; it stays unchanged.
        example: the model's input: a tensor, a tuple of arguments, or a dict of keyword arguments; or a function of the model
            that returns outputs, such as `lambda model: model.generate(tokens)`. Forms are timed with it.
        form: "auto": the fastest, timed on this machine. Or one for all layers: "dense" (nn.Linear), "packed" (live blocks),
            "packed-int8" (live blocks as whole numbers of 8 bits), "factored" (Kronecker factors; layers of free values are
            packed) or "bsr" (torch's block-sparse layout).
        precision: "int8": "auto" may choose "packed-int8", which changes outputs, where it is fastest.
        slim: remove features between two layers that are constant or unread (see `kronblocks.deploy.slimming`), if
            `torch.export` can trace the model.
        sparsifier: for methods on plain nn.Linear, to pack the layers that it masks.
        tolerance: how far outputs may differ, relative to the largest; None: 1e-4, or four roundings of a lower precision, and
            twice the sum of the differences that int8 layers make on their own.
        evaluate: a number for a model in eval mode, such as its accuracy on held-out data. It is computed for the model and for
            the copy, and printed.
        phases: several examples by name instead of one, such as {"prefill": ..., "decode": ...} of a model that generates.
        weights: how often each of the phases is called, by name; 1 if it is left out.
        budget: seconds for timing whole models; 0 leaves each layer in its own fastest form. `KRONBLOCKS_MEASURE=0` does, too.
        progress: gets a few words at a time, about what is being timed.

    Returns:
        The copy, the form of each layer, the times of whole models, the difference, and what `evaluate` says.

    Raises:
        KronblocksError: there is no block layer, outputs differ by more than the tolerance, or a layer with int8 values differs
            from its float layer by more than rounding explains (equation 28 in docs/math.md).

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
    number("budget", budget, 0, float("inf"), "seconds, from 0 on")
    if precision == "int8" and form not in ("auto", INT8):
        raise KronblocksError(f"precision='int8' is for form='auto' or 'packed-int8', not {form!r}: omit one of the two")
    if tolerance is not None:
        number("tolerance", tolerance, 0, float("inf"), "a share of the largest output, from 0 on")
    examples, weights = _phases(example, phases, weights)
    with evaluating(model):
        expected = [list(tensors(call_or_refuse(model, each))) for each in examples.values()]
        score = None if evaluate is None else _score(evaluate, model)
        new = copy.deepcopy(bare(model)).requires_grad_(False)
    if not any(expected):
        raise KronblocksError(
            "the model returns no floating-point tensors for the example, so the copy cannot be checked: give an input beside "
            'it, phases={"prefill": tokens, "generate": function}'
        )
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
    slimmed, remark = _slim(new, list(examples.values())) if slim else ([], "")
    wanted = Wanted(form, precision == "int8")
    shape = _Shaping(new, _calls(new, names, examples, weights), wanted)
    whole = None
    if form == "auto" and budget > 0 and measuring_allowed():
        with evaluating(model):
            stage = Stage(new, model, shape.places, examples, weights, compiled=hasattr(model, "_orig_mod"))
            whole = shape.judged(stage, budget, progress or (lambda what: None))
    layers = [shape.settle(name) for name in names]
    with checked_rounding(new, shape.floats) as rounding:
        found = [list(tensors(call(new, each))) for each in examples.values()]
    error = max(difference(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
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
    inputs = [each for each in examples.values() if not callable(each)]
    return Exported(new, layers, tuple(slimmed), remark, error, scores, whole, inputs[0] if inputs else None)


def _phases(example: Any, phases: Any, weights: Any) -> tuple[dict[str, Any], dict[str, float]]:
    """The examples and their weights, by name.

    Raises:
        KronblocksError: there is none, or both ways are used; or weights are not of the phases.
    """
    if (example is None) == (phases is None) or (phases is not None and not (isinstance(phases, Mapping) and phases)):
        raise KronblocksError(
            "export needs an example of the model's input, or several: export(model, example), or export(model, phases="
            '{"prefill": ..., "decode": ...})'
        )
    found = {"": example} if phases is None else {str(name): each for name, each in phases.items()}
    given = dict(weights or {})
    if given and phases is None:
        raise KronblocksError("weights= is for phases=, several examples by name: leave it out")
    if unknown := given.keys() - found.keys():
        raise KronblocksError(f"weights= names {min(map(str, unknown))!r}, which is no phase: there are {', '.join(found)}")
    for name, weight in given.items():
        number(f"weights[{name!r}]", weight, 0, float("inf"), "how often the phase is called")
    if not any(given.get(name, 1) for name in found):
        raise KronblocksError("weights= of all phases are 0, so that no time would count: give one a weight above 0")
    return found, {name: float(given.get(name, 1)) for name in found}


def _slim(model: nn.Module, examples: Sequence[Any]) -> tuple[list[Slimmed], str]:
    """Remove dead features, traced with the first example that is an input."""
    inputs = [each for each in examples if not callable(each)]
    if not inputs:
        return [], "no features were removed: a function as the example cannot be traced"
    return remove_dead_features_(model, *arguments(inputs[0]))


def _calls(
    model: nn.Module, names: Sequence[str], examples: Mapping[str, Any], weights: Mapping[str, float]
) -> dict[str, list[Call]]:
    """The last call of each layer in each example."""
    found: dict[str, list[Call]] = {name: [] for name in names}
    for phase, example in examples.items():
        with rows_reaching({name: model.get_submodule(name) for name in names}) as rows:
            call(model, example)
        for name, calls in rows.items():
            found[name].append(Call(calls[-1] if calls else (0,), weights[phase]))
    return found


def _score(evaluate: Callable[[nn.Module], float], model: nn.Module) -> float:
    with torch.no_grad():
        found: Any = evaluate(model)
    try:
        return float(found)
    except (TypeError, ValueError) as error:
        raise KronblocksError(f"evaluate returned {type(found).__name__}, not a number: return a float") from error


def _tolerance(model: nn.Module, outputs: list[list[Tensor]]) -> float:
    """How far a copy may differ by rounding in the lowest precision of the model's weights and outputs."""
    together = (*model.parameters(), *(tensor for each in outputs for tensor in each))
    dtypes = {tensor.dtype for tensor in together if tensor.is_floating_point()}
    return max(1e-4, *(4 * torch.finfo(dtype).eps for dtype in dtypes))


class _Shaping:
    """The block layers of a model, the forms that they may have, and those that they get.

    Args:
        model: gets them.
        calls: of each layer.
        wanted: what the user asks for.
    """

    def __init__(self, model: nn.Module, calls: Mapping[str, list[Call]], wanted: Wanted) -> None:
        self._model, self._calls = model, calls
        self.floats: dict[str, BlockSparseLinear] = {}
        """The float layers of those with int8 values, by name."""
        self.places: list[Place] = []
        self._old: dict[str, BlockLayer] = {}
        self._around: dict[str, nn.Module] = {}
        self._chosen: dict[str, Chosen] = {}
        self._possible: dict[str, dict[str, Chosen]] = {}
        for name, each in calls.items():
            layer = model.get_submodule(name)
            assert isinstance(layer, BlockLayer)
            if layer.convolution is not None and len(each[-1].shape) == 3:
                layer.convolution = layer.convolution._replace(size=(each[-1].shape[1], each[-1].shape[2]))
            around = model.get_submodule(name.rpartition(".")[0])
            own = wanted._replace(int8=False) if isinstance(around, UnfoldedConv) else wanted  # copies of patches: not timed
            self._around[name] = around
            self._old[name], self._chosen[name] = layer, choose(layer, each, own)
            self._possible[name] = possible(layer, self._chosen[name], each, own)
            self.places.append(self._place(name, layer, around))

    def _place(self, name: str, layer: BlockLayer, around: nn.Module) -> Place:
        outer = name.rpartition(".")[0] if isinstance(around, Unfolded) else name
        work = layer.in_features * layer.out_features * sum(call.rows * call.weight for call in self._calls[name])
        forms = tuple(self._possible[name])
        return Place(outer, name, lambda form: self._module(name, form), forms, work, kind_of(name, layer))

    def _module(self, name: str, form: str) -> nn.Module:
        """What stands at a layer's place in a form: the layer, or the convolution around it."""
        new, around = self._layer(name, self._possible[name][form]), self._around[name]
        if not isinstance(around, Unfolded):
            return new
        shell = copy.copy(around)
        shell._modules = dict(around._modules)
        shell.linear = new
        return shell.folded() if form == "dense" else shell

    def _layer(self, name: str, chosen: Chosen) -> nn.Module:
        if chosen.form != INT8:
            return in_form(self._old[name], chosen).eval().requires_grad_(False)
        packed = in_form(self._old[name], chosen)
        assert isinstance(packed, BlockSparseLinear)
        self.floats[name] = packed
        return QuantizedBlockLinear.from_packed(packed).eval()

    def judged(self, stage: Stage, budget: float, progress: Callable[[str], None]) -> Whole:
        """Choose the forms with which the whole model is fastest, by timing it."""
        keys = list(self._possible)
        layers = {name: self._chosen[name].key for name in keys}
        was = {name: self._old[name].active_plan for name in keys}
        wholes = {
            "layers": tuple(layers.values()),
            "packed": tuple("packed" for _ in keys),
            "dense": tuple("dense" for _ in keys),
            "as it was": tuple(was[name] if was[name] in self._possible[name] else "packed" for name in keys),
        }
        if all(INT8 in self._possible[name] for name in keys):
            wholes["packed-int8"] = tuple(INT8 for _ in keys)
        groups: dict[str, list[int]] = {}
        for i in sorted(range(len(keys)), key=lambda i: -self.places[i].work):
            groups.setdefault(self.places[i].kind, []).append(i)
        options = [place.forms for place in self.places]
        stage.prepare(wholes.values(), progress)
        found = judging.judge(wholes, {} if stage.is_compiled else groups, options, stage.turn, budget, progress)
        stage.restore()
        for name, form in zip(keys, found.forms, strict=True):
            if form != self._chosen[name].key:
                why = f"the whole model is faster with it; alone {self._chosen[name].why}"
                self._chosen[name] = self._possible[name][form]._replace(why=why)
        return Whole(dict(found.seconds), found.timed, found.complete, stage.weights)

    @torch.no_grad()
    def settle(self, name: str) -> ExportedLayer:
        """Give a layer its form for good, with the hooks of the one that it replaces."""
        old, chosen = self._old[name], self._chosen[name]
        self.floats.pop(name, None)
        new, around = self._layer(name, chosen), self._around[name]
        replace_(self._model, name, new)
        if isinstance(around, Unfolded) and chosen.form == "dense":
            replace_(self._model, name.rpartition(".")[0], around.folded())
        stored = sum(t.numel() * t.element_size() for t in new.state_dict().values())
        size, block, rows = (old.out_features, old.in_features), str(old.grid.block), self._calls[name][-1].rows
        return ExportedLayer(name, chosen.form, *size, block, old.density, rows, stored, chosen.why, dict(chosen.timed))
