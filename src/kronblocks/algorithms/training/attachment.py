"""The tie between a sparsifier and the user's optimisers: which ones may be followed, and how it is undone."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import nn
from torch.optim import LBFGS, Optimizer

from kronblocks.algorithms.targets import BlockTarget
from kronblocks.algorithms.training.unfollowed import attached
from kronblocks.core.errors import KronblocksError, KronblocksWarning
from kronblocks.core.parameters import ParameterHook, hooks_that_end
from kronblocks.core.tables import some

PART = "part"
"""The key of an optimiser's group that says which call of `parameter_groups` it came from."""


class _Follows(Protocol):
    """What is looked at of a sparsifier."""

    model: nn.Module
    targets: list[BlockTarget]


class Attachment:
    """The tie between a `Sparsifier` and optimisers; `remove()` undoes it."""

    def __init__(self, handles: Sequence[Any], release: Callable[[], None]) -> None:
        self._handles, self._release = handles, release

    def __reduce__(self) -> tuple[type[Attachment], tuple[Any, ...]]:  # a copy is tied to nothing
        return Attachment, ((), _nothing)

    def remove(self) -> None:
        """Take all hooks off the optimisers and parameters. The masks stay as they are."""
        for handle in self._handles:
            handle.remove()
        self._handles = ()
        self._release()


def _nothing() -> None:
    """What a copy of an attachment releases."""


def check_optimizers(optimizers: Sequence[Optimizer], sparsifier: _Follows, *, lifts: bool) -> None:
    """Refuse optimisers that a sparsifier cannot follow.

    Args:
        optimizers: what `attach` got, out of the wrappers that only pass steps on.
        sparsifier: whose layers are to be followed.
        lifts: whether factors will become free values.

    Raises:
        KronblocksError: LBFGS, an optimiser whose steps run no hooks, flattened weights, a targeted parameter in none of
            the optimisers, or one whose layers another sparsifier follows; before a lift, parameters that two layers share, and
            optimisers that go on stepping copies or parts of the factors.
    """
    if not optimizers or not all(isinstance(optimizer, Optimizer) for optimizer in optimizers):
        raise KronblocksError("attach wants a torch optimiser or a list of them: sparsifier.attach(optimizer, total_steps=...)")
    for optimizer in optimizers:
        if not _runs_hooks(optimizer):
            raise KronblocksError(
                f"steps of {type(optimizer).__name__} run no hooks, by which a sparsifier follows them: its __init__ has to call "
                "super().__init__(params, defaults), as torch's optimisers do"
            )
    if any(isinstance(optimizer, LBFGS) for optimizer in optimizers):
        raise KronblocksError(
            "LBFGS calls its closure several times in one step and expects a fixed set of weights, so its line search and a "
            "changing mask do not go together: use AdamW, SGD or another optimiser of one gradient per step"
        )
    check_not_followed([target.module for target in sparsifier.targets], optimizers)
    if flattened := [target.name for target in sparsifier.targets if _is_flattened(target)]:
        raise KronblocksError(
            f"the weights of {some(flattened)} have been flattened, as FullyShardedDataParallel does: use fully_shard, "
            "which leaves them their shape"
        )
    if missing := _not_held(optimizers, sparsifier.targets):
        raise KronblocksError(
            f"no optimiser holds the parameters of {some(missing)}: make the "
            "optimiser after sparsify_, from kronblocks.parameter_groups(model, lr=...) or model.parameters()"
        )
    if lifts:
        _check_lift(optimizers, sparsifier.model, [target for target in sparsifier.targets if target.is_factored])


def _check_lift(optimizers: Sequence[Optimizer], model: nn.Module, targets: Sequence[BlockTarget]) -> None:
    """Refuse what would go on with the factors when they have become free values, and say which hooks will not."""
    instead = "or choose a method without a lift, such as magnitude"
    for optimizer in optimizers:
        if any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(optimizer).__mro__):
            raise KronblocksError(
                "ZeroRedundancyOptimizer shares parameters out among the processes when it is made, and would never step those "
                f"that the lift makes: use the optimiser inside it under DistributedDataParallel, use fully_shard, {instead}"
            )
    for target in targets:
        if any(hasattr(parameter, "_in_backward_optimizers") for parameter in target.parameters()):
            raise KronblocksError(
                f"{target.name} is stepped in backward by torch's _apply_optimizer_in_backward, which would not step what the "
                "lift makes: make an optimiser for each parameter, and call its step() and zero_grad() in one function that "
                f"register_post_accumulate_grad_hook gets on every parameter, {instead}"
            )
    if moved := [target.name for target in targets if not _is_in_place(model, target)]:
        raise KronblocksError(
            f"{some(moved)} are no longer found under these names, by which the lift replaces layers: put wrappers "
            f"around parts of the model before sparsify_, {instead}"
        )
    check_apart({target.name: target.parameters() for target in targets})
    warn_of_hooks(
        {name: hooks for target in targets for name, hooks in hooks_that_end(_named(target)).items()}, "will end at the lift"
    )


def _is_in_place(model: nn.Module, target: BlockTarget) -> bool:
    try:
        return any(each is target.module for each in model.get_submodule(target.name).modules())
    except AttributeError:
        return False


def check_apart(layers: Mapping[str, Sequence[nn.Parameter]]) -> None:
    """Refuse layers that share a factor.

    Raises:
        KronblocksError: two do.
    """
    owners: dict[int, str] = {}
    for name, parameters in layers.items():
        for parameter in parameters:
            if (other := owners.setdefault(id(parameter), name)) != name:
                raise KronblocksError(
                    f"{other} and {name} share factors, which the lift would tear apart: put one module in both places instead"
                )


def _named(target: BlockTarget) -> dict[str, nn.Parameter]:
    ids = {id(p) for p in target.parameters()}
    return {f"{target.name}.{name}": p for name, p in target.module.named_parameters() if id(p) in ids}


def warn_of_hooks(ending: Mapping[str, Sequence[ParameterHook]], when: str) -> None:
    """One warning for the hooks on factors, by parameter, that do not go on on the values of the lift."""
    named = [f"{hook.name} on {name}" for name, hooks in ending.items() for hook in hooks]
    if named:
        warnings.warn(
            f"hooks on parameters {when}: {some(named)}. A layer's values keep the "
            "hooks that were the same on all of its factors: register one function on each of them, or register hooks again "
            'when sparsifier.phase is "refine"',
            KronblocksWarning,
            stacklevel=2,
        )


def check_held(optimizers: Sequence[Optimizer], targets: Sequence[BlockTarget]) -> None:
    """Refuse to go on where layers have got parameters in a training that no optimiser has.

    Raises:
        KronblocksError: there are any.
    """
    if missing := _not_held(optimizers, targets):
        raise KronblocksError(
            f"{some(missing)} {'has' if len(missing) == 1 else 'have'} parameters now that no optimiser holds, which "
            "would stay as they are: give the optimiser to what replaces layers, as in lift_(model, optimizer), or make "
            "optimiser and sparsifier again after replacing layers or weights"
        )


def _not_held(optimizers: Sequence[Optimizer], targets: Sequence[BlockTarget]) -> list[str]:
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    return [target.name for target in targets if any(p.requires_grad and id(p) not in held for p in target.parameters())]


def _is_flattened(target: BlockTarget) -> bool:
    try:
        parameters = target.parameters()
    except AttributeError:  # they are not even there
        return True
    return not parameters or any(p.dim() < 2 for p in parameters)


def check_not_followed(modules: Sequence[nn.Module], optimizers: Sequence[Optimizer] = ()) -> None:
    """Refuse layers that another sparsifier follows and has not yet pruned, or that it follows through the same optimiser.

    Args:
        modules: the layers, or what they are in.
        optimizers: those that they are to be followed through.

    Raises:
        KronblocksError: one does.
    """
    if _followed_already(modules, optimizers):
        gc.collect()  # a training that nobody holds any more is a cycle of sparsifier and optimiser
    if names := _followed_already(modules, optimizers):
        raise KronblocksError(
            f"another sparsifier, which is attached, follows {some(names)}: use that "
            "one, or call remove() on the handle that its attach gave (or delete it and its optimiser), then call sparsify_, "
            "which goes on from the block layers that are there, and make a new optimiser"
        )


def _followed_already(modules: Sequence[nn.Module], optimizers: Sequence[Optimizer]) -> list[str]:
    """Names of the layers, as the other sparsifier calls them."""
    ids = {id(each) for module in modules for each in module.modules()}
    return [
        target.name
        for other, followed in attached()
        if other.phase != "heal" or any(optimizer in followed for optimizer in optimizers)
        for target in other.targets
        if id(target.module) in ids
    ]


def unwrapped(optimizer: Any) -> Any:
    """The optimiser whose steps run hooks: Accelerate and Lightning keep it in `optimizer` of what passes steps on."""
    inner = getattr(optimizer, "optimizer", None)
    passes_on = isinstance(inner, Optimizer) and not _runs_hooks(optimizer) and "state" not in vars(optimizer)
    return unwrapped(inner) if passes_on else optimizer


def _runs_hooks(optimizer: Any) -> bool:
    return getattr(type(optimizer).step, "hooked", False) and hasattr(optimizer, "_optimizer_step_post_hooks")


def number_parts_(optimizers: Sequence[Optimizer]) -> None:
    """Number the parts that `parameter_groups` made from 0 on in each optimiser, so that saved states of equal runs are equal."""
    for optimizer in optimizers:
        numbers: dict[Any, int] = {}
        for group in optimizer.param_groups:
            if PART in group:
                group[PART] = numbers.setdefault(group[PART], len(numbers))
