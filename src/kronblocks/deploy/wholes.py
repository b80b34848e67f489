"""One model whose block layers change their forms, and the seconds that it then takes."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from kronblocks.deploy import judging
from kronblocks.deploy.judging import Forms
from kronblocks.deploy.outputs import prepared, run_example

_TURN = 5e-3  # seconds: a call that takes less is repeated in its turn
_MOST_CALLS = 20
_LONG = 0.2  # seconds: a call that takes longer needs no other one before it, to fill the caches


@dataclass
class Place:
    """Where a block layer is in a model, and what can stand there.

    Args:
        name: of the module that is exchanged: the layer, or the convolution around it.
        layer: name of the layer.
        make: makes the module for a form.
        forms: the possible ones.
        work: multiply-adds of a call, to put large layers first.
        kind: equal for layers that are alike.
    """

    name: str
    layer: str
    make: Callable[[str], nn.Module]
    forms: tuple[str, ...]
    work: float
    kind: str
    made: dict[str, nn.Module] = field(default_factory=dict)

    def module(self, form: str) -> nn.Module:
        """The module for a form, made once."""
        if form not in self.made:
            self.made[form] = self.make(form).eval().requires_grad_(False)
        return self.made[form]


def kind_of(name: str, layer: Any) -> str:
    """The name without its numbers, and the sizes: equal for the layers that are switched together."""
    return f"{re.sub(r'[0-9]+', '*', name)} {layer.out_features}x{layer.in_features}"


class Stage:
    """Times a model with any forms of its layers, and the model as it was.

    Args:
        model: whose block layers are at the places.
        original: the model as it was, in eval mode.
        places: of the block layers.
        phases: examples, by name.
        weights: how often each is called.
        compiled: time `torch.compile`d copies.
    """

    def __init__(
        self,
        model: nn.Module,
        original: nn.Module,
        places: Sequence[Place],
        phases: Mapping[str, Any],
        weights: Mapping[str, float],
        compiled: bool = False,
    ) -> None:
        self.model, self.original, self.places = model, original, places
        self._phases, self.weights, self.is_compiled = phases, weights, compiled
        self._compiled: dict[Forms, Any] = {}
        self._compile: Callable[[nn.Module], Any] = getattr(original, "dynamo_ctx", torch.compile)  # as the user compiled it
        self._parents: list[list[tuple[nn.Module, str]]] = []
        for place in places:
            old = model.get_submodule(place.name)
            parents = [(parent, child) for parent in model.modules() for child, each in parent._modules.items() if each is old]
            self._parents.append(parents)
        self._before = [model.get_submodule(place.name) for place in places]
        self._calls: dict[str, int] = {}
        device = next((each.device for each in model.parameters()), torch.device("cpu"))
        self._wait: Callable[[], object] = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def set(self, forms: Sequence[str]) -> None:
        """Give the layers these forms."""
        self._put([place.module(form) for place, form in zip(self.places, forms, strict=True)])

    def restore(self) -> None:
        """Put the layers back that were there at first."""
        self._put(self._before)

    def _put(self, modules: Sequence[nn.Module]) -> None:
        for module, parents in zip(modules, self._parents, strict=True):
            for parent, child in parents:
                if parent._modules[child] is not module:
                    parent._modules[child] = module

    def turn(self, forms: Forms | None) -> float:
        """Seconds of all phases by their weights, each called several times if it is short."""
        model = self._model(forms)
        return sum(self.weights[name] * self._seconds(name, model) for name in self._phases)

    def _model(self, forms: Forms | None) -> Any:
        if forms is None:
            return self.original
        if self.is_compiled:
            return self._compiled[forms]
        self.set(forms)
        return self.model

    @torch.no_grad()
    def prepare(self, wholes: Iterable[Forms], progress: Callable[[str], None]) -> None:
        """Compile these wholes, if compiled ones are to be timed."""
        for forms in dict.fromkeys(wholes) if self.is_compiled else ():
            progress(f"compiling {len(self._compiled) + 1}")
            self.set(forms)
            self._compiled[forms] = self._compile(copy.deepcopy(self.model))
            for example in self._phases.values():
                run_example(self._compiled[forms], prepared(example))

    @torch.no_grad()
    def _seconds(self, name: str, model: Any) -> float:
        example = self._phases[name]
        calls = self._calls.get(name, 1)
        if calls > 1 or name not in self._calls:
            first = self._timed(model, [prepared(example)])
            if name not in self._calls:
                self._calls[name] = 1 if first > _LONG else 2
                self._calls[name] = max(self._calls[name], min(_MOST_CALLS, math.ceil(_TURN / max(first, 1e-9))))
        return self._timed(model, [prepared(example) for _ in range(max(1, self._calls[name] - 1))])

    def _timed(self, model: Any, examples: list[Any]) -> float:
        self._wait()
        start = judging.now()
        for example in examples:
            run_example(model, example)
        self._wait()
        return (judging.now() - start) / len(examples)
