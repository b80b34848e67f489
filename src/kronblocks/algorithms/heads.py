"""Find the heads: the layers that make the model's output. Their output reaches no other layer in the first training steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kronblocks.core.errors import KronblocksError
from kronblocks.core.hooks import Onlooker, OwnHook
from kronblocks.core.processes import broadcast_

Source = Literal["named", "traced", "called last", "defined last"]
"""How heads were found. The last two kinds are guesses, with one head only."""


class _Trace:
    """What hooks saw of the paths between layers. Marks are on nodes of the autograd graph, and are freed with it."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}  # number of calls of each target, in the order of first calls
        self.traced: set[str] = set()  # targets whose outputs had a graph
        self.passed_on: dict[str, int] = {}  # the last call of a target whose output reached another layer
        self.last: str | None = None
        self.compiled = False  # whether the model is compiled, so that hooks see no graph

        def while_compiling(_: Any) -> None:
            self.compiled = True

        self.while_compiling = while_compiling

    def __reduce__(self) -> tuple[type[_Trace], tuple[()]]:  # a copy has seen nothing
        return _Trace, ()

    def note_compilation(self) -> None:
        """Note that code is being compiled; this call is not part of the compiled code."""
        from torch._dynamo.comptime import comptime  # slow to import; the compiler has imported it already

        comptime(self.while_compiling)

    def leaves(self, name: str, output: Tensor) -> None:
        """Mark the output of a target that was called."""
        self.calls[name] = self.calls.get(name, 0) + 1
        self.last = name
        node: Any = output.grad_fn
        if node is not None:
            self.traced.add(name)
            node.metadata[self] = (name, self.calls[name])

    def arrives(self, inputs: Iterator[Tensor]) -> None:
        """Before a call of a layer with weights: the targets that led to its inputs make no output of the model."""
        waiting: list[Any] = [tensor.grad_fn for tensor in inputs if tensor.grad_fn is not None]
        while waiting:
            node = waiting.pop()
            mark = node.metadata.get(self)
            if mark == "seen":
                continue
            if mark is not None:
                name, call = mark
                self.passed_on[name] = max(call, self.passed_on.get(name, 0))
            node.metadata[self] = "seen"
            waiting += [before for before, _ in node.next_functions if before is not None]

    def sinks(self) -> list[str]:
        """The targets whose last output reached no other layer."""
        return [name for name, calls in self.calls.items() if name in self.traced and self.passed_on.get(name, 0) < calls]


def _is_training(module: nn.Module) -> bool:
    in_backward = torch._C._current_graph_task_id() != -1  # where checkpointing computes a part again
    return module.training and torch.is_grad_enabled() and not in_backward


class _Arrival(Onlooker):
    """The pre-hook of a layer with weights."""

    def __init__(self, trace: _Trace) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[type[OwnHook], tuple[()]]:
        return OwnHook, ()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if torch.compiler.is_compiling():
            self._trace.note_compilation()
        elif _is_training(module):
            self._trace.arrives(_tensors((*args, *kwargs.values())))


class _Leaving(Onlooker):
    """The forward hook of a target."""

    def __init__(self, trace: _Trace, name: str) -> None:
        self._trace, self._name = trace, name

    def __reduce__(self) -> tuple[type[OwnHook], tuple[()]]:
        return OwnHook, ()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling():
            self._trace.note_compilation()
        elif _is_training(module) and isinstance(output, Tensor):
            self._trace.leaves(self._name, output)


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _has_matrix(module: nn.Module, *, recurse: bool) -> bool:
    return any(parameter.dim() > 1 for parameter in module.parameters(recurse=recurse))


def possible_heads(model: nn.Module, targets: Sequence[str]) -> tuple[str, ...]:
    """The targets that may be heads, as far as is known before any step.

    A layer is none if a module with a weight matrix follows it in an nn.Sequential. Of the others nothing is known.

    >>> possible_heads(nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))}), ["a.0", "a.2"])
    ('a.2',)
    """

    def passes_on(name: str) -> bool:
        parts = name.split(".")
        for depth, part in enumerate(parts):
            around = model.get_submodule(".".join(parts[:depth]))
            if isinstance(around, nn.Sequential) and type(around).forward is nn.Sequential.forward:
                places = list(around._modules)
                if any(_has_matrix(around[place], recurse=True) for place in range(places.index(part) + 1, len(places))):
                    return True
        return False

    return tuple(name for name in targets if not passes_on(name))


class Heads:
    """Finds the heads: the targeted layers that make the model's output. Each block row of a head keeps a block.

    A head's output reaches no other layer with a weight matrix, sparse or dense. There may be several heads, or none if a
    dense layer makes the output. Hooks look at the first training steps, and are removed once every target has been called.
    They see nothing in a compiled model, so it runs one step uncompiled.

    Args:
        targets: names of the targeted layers, in the model's order.
        named: heads that the user named; None: they are to be found.
    """

    def __init__(self, targets: Sequence[str], named: Sequence[str] | None = None) -> None:
        self._targets = tuple(targets)
        self.names: tuple[str, ...] | None = None if named is None else tuple(named)
        self.source: Source | None = None if named is None else "named"
        self._trace = _Trace()
        self._handles: list[RemovableHandle] = []
        self._asked = False

    def __getstate__(self) -> dict[str, Any]:  # a copy has no hooks
        return {**self.__dict__, "_handles": []}

    def watch(self, model: nn.Module, targets: Sequence[nn.Module]) -> list[RemovableHandle]:
        """Hook the coming training steps, unless the heads are known; returns the hooks' handles."""
        if self.names is not None:
            return []
        self._trace, self._asked = _Trace(), False
        self._handles = [
            module.register_forward_pre_hook(_Arrival(self._trace), with_kwargs=True)
            for module in model.modules()
            if _has_matrix(module, recurse=False)
        ]
        for name, module in zip(self._targets, targets, strict=True):
            self._handles.append(module.register_forward_hook(_Leaving(self._trace, name)))
        return list(self._handles)

    def want_eager_step(self) -> bool:
        """After a step: whether the next one should run uncompiled, because this one did not show every target."""
        if not self._handles:
            return False
        if set(self._targets) <= self._trace.calls.keys():
            self._remove_hooks()
        elif not self._asked:
            self._asked = True
            return True
        return False

    def decide(self, device: torch.device | str = "cpu") -> tuple[str, ...]:
        """The heads among the targets. The first answer is final, and equal in every process."""
        if self.names is None:
            trace = self._trace
            found, self.source = trace.sinks(), "traced"
            if not trace.traced:
                found, self.source = ([trace.last], "called last") if trace.last else (list(self._targets[-1:]), "defined last")
            flags = broadcast_(torch.tensor([name in found for name in self._targets], device=device))
            self.names = tuple(name for name, is_head in zip(self._targets, flags.tolist(), strict=True) if is_head)
            self._remove_hooks()
        return self.names

    def _remove_hooks(self) -> None:
        while self._handles and not self._trace.compiled:  # removing hooks would compile a compiled model again
            self._handles.pop().remove()

    def state_dict(self) -> dict[str, Any]:
        """What was found, as plain values."""
        return {"names": None if self.names is None else list(self.names), "source": self.source}

    def load_state_dict(self, state: Any) -> None:
        """Restore what was found. Heads that the user named stay.

        Raises:
            KronblocksError: the state is damaged.
        """
        names, source = parsed_heads(state)
        if self.source != "named" and names is not None:
            self.names, self.source = names, source
            self._remove_hooks()


def parsed_heads(state: Any) -> tuple[tuple[str, ...] | None, Source | None]:
    """Read what `Heads.state_dict` gave: the names (None: not known yet), and how they were found.

    Older states lack this part; then the heads are found again.

    Raises:
        KronblocksError: the state is damaged.
    """
    if state is None:
        return None, None
    names, source = (state.get("names", ()), state.get("source")) if isinstance(state, dict) else ((), None)
    whole = names is None or (isinstance(names, list) and all(isinstance(name, str) for name in names))
    if not whole or source not in (None, *get_args(Source)):
        raise KronblocksError("the state's part on heads is damaged: save sparsifier.state_dict() again")
    return None if names is None else tuple(names), source
