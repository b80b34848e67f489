"""Attach a sparsifier to the user's optimisers: check which ones can be followed, and detach again."""

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
"""Key in an optimiser's group: the number of the `parameter_groups` call that made it."""


class _Follows(Protocol):
    """The attributes of a sparsifier that are read here."""

    model: nn.Module
    targets: list[BlockTarget]


class Attachment:
    """The handle that `attach` returns; `remove()` undoes it."""

    def __init__(self, handles: Sequence[Any], release: Callable[[], None]) -> None:
        self._handles, self._release = handles, release

    def __reduce__(self) -> tuple[type[Attachment], tuple[Any, ...]]:  # a copy is attached to nothing
        return Attachment, ((), _nothing)

    def remove(self) -> None:
        """Take all hooks off the optimisers and parameters. The masks stay as they are."""
        for handle in self._handles:
            handle.remove()
        self._handles = ()
        self._release()


def _nothing() -> None:
    """The release of a copied attachment."""


def check_optimizers(optimizers: Sequence[Optimizer], sparsifier: _Follows, *, lifts: bool) -> None:
    """Refuse optimisers that a sparsifier cannot follow.

    Args:
        optimizers: what `attach` got, without wrappers that only forward steps.
        sparsifier: the one that will follow them.
        lifts: whether factors will become free values.

    Raises:
        KronblocksError: LBFGS; an optimiser whose steps run no hooks; flattened weights; a targeted parameter that no
            optimiser holds; layers that another sparsifier follows. If there will be a lift, also parameters that two layers
            share, and optimisers that step copies or parts of the factors.
    """
    if not optimizers or not all(isinstance(optimizer, Optimizer) for optimizer in optimizers):
        raise KronblocksError("attach needs a torch optimiser or a list of them: sparsifier.attach(optimizer, total_steps=...)")
    for optimizer in optimizers:
        if not _runs_hooks(optimizer):
            raise KronblocksError(
                f"steps of {type(optimizer).__name__} run no hooks, but a sparsifier needs them: call "
                "super().__init__(params, defaults) in its __init__, as torch's optimisers do"
            )
    if any(isinstance(optimizer, LBFGS) for optimizer in optimizers):
        raise KronblocksError(
            "LBFGS calls its closure several times in one step, and its line search cannot work with a changing mask: "
            "use AdamW, SGD or another optimiser with one gradient per step"
        )
    check_not_followed([target.module for target in sparsifier.targets], optimizers)
    if flattened := [target.name for target in sparsifier.targets if _is_flattened(target)]:
        raise KronblocksError(
            f"the weights of {some(flattened)} have been flattened, as FullyShardedDataParallel does: use fully_shard, "
            "which keeps their shape"
        )
    if missing := _not_held(optimizers, sparsifier.targets):
        raise KronblocksError(
            f"no optimiser holds the parameters of {some(missing)}: make the "
            "optimiser after sparsify_, from kronblocks.parameter_groups(model, lr=...) or model.parameters()"
        )
    if lifts:
        _check_lift(optimizers, sparsifier.model, [target for target in sparsifier.targets if target.is_factored])


def _check_lift(optimizers: Sequence[Optimizer], model: nn.Module, targets: Sequence[BlockTarget]) -> None:
    """Refuse optimisers that would still step factors after the lift, and warn of hooks that will end."""
    instead = "or choose a method without a lift, such as magnitude"
    for optimizer in optimizers:
        if any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(optimizer).__mro__):
            raise KronblocksError(
                "ZeroRedundancyOptimizer assigns parameters to processes when it is made, and would never step those of the "
                f"lift: use its inner optimiser with DistributedDataParallel, use fully_shard, {instead}"
            )
    for target in targets:
        if any(hasattr(parameter, "_in_backward_optimizers") for parameter in target.parameters()):
            raise KronblocksError(
                f"{target.name} is stepped in backward by torch's _apply_optimizer_in_backward, which would not step the lifted "
                "values. Make an optimiser for each parameter. Pass one function that calls its step() and zero_grad() to "
                f"register_post_accumulate_grad_hook of every parameter, {instead}"
            )
    if moved := [target.name for target in targets if not _is_in_place(model, target)]:
        raise KronblocksError(
            f"{some(moved)} are no longer found under these names, which the lift needs: put wrappers "
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
    """Raise KronblocksError if two layers share a factor."""
    owners: dict[int, str] = {}
    for name, parameters in layers.items():
        for parameter in parameters:
            if (other := owners.setdefault(id(parameter), name)) != name:
                raise KronblocksError(
                    f"{other} and {name} share factors, which the lift would separate: put one module in both places instead"
                )


def _named(target: BlockTarget) -> dict[str, nn.Parameter]:
    ids = {id(p) for p in target.parameters()}
    return {f"{target.name}.{name}": p for name, p in target.module.named_parameters() if id(p) in ids}


def warn_of_hooks(ending: Mapping[str, Sequence[ParameterHook]], when: str) -> None:
    """Give one warning for the hooks on factors, by parameter name, that end at the lift."""
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
    """Raise KronblocksError if layers have got parameters during the training that no optimiser holds."""
    if missing := _not_held(optimizers, targets):
        raise KronblocksError(
            f"{some(missing)} {'has' if len(missing) == 1 else 'have'} parameters now that no optimiser holds, so nothing would "
            "train them: pass the optimiser to the function that replaces layers, as in lift_(model, optimizer), or make "
            "optimiser and sparsifier again after replacing layers or weights"
        )


def _not_held(optimizers: Sequence[Optimizer], targets: Sequence[BlockTarget]) -> list[str]:
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    return [target.name for target in targets if any(p.requires_grad and id(p) not in held for p in target.parameters())]


def _is_flattened(target: BlockTarget) -> bool:
    try:
        parameters = target.parameters()
    except AttributeError:  # there is no such layer
        return True
    return not parameters or any(p.dim() < 2 for p in parameters)


def check_not_followed(modules: Sequence[nn.Module], optimizers: Sequence[Optimizer] = ()) -> None:
    """Refuse layers that another sparsifier has yet to prune, or that it follows through the same optimiser.

    Args:
        modules: the layers, or modules that contain them.
        optimizers: those of this sparsifier.

    Raises:
        KronblocksError: there are such layers.
    """
    if _followed_already(modules, optimizers):
        gc.collect()  # a training that nobody holds any more is a cycle of sparsifier and optimiser
    if names := _followed_already(modules, optimizers):
        raise KronblocksError(
            f"another sparsifier, which is attached, follows {some(names)}: use that "
            "one. Or call remove() on the handle that its attach returned (or delete it and its optimiser), call sparsify_, "
            "which keeps the present block layers, and make a new optimiser"
        )


def _followed_already(modules: Sequence[nn.Module], optimizers: Sequence[Optimizer]) -> list[str]:
    """The names that the other sparsifier has for the layers."""
    ids = {id(each) for module in modules for each in module.modules()}
    return [
        target.name
        for other, followed in attached()
        if other.phase != "heal" or any(optimizer in followed for optimizer in optimizers)
        for target in other.targets
        if id(target.module) in ids
    ]


def unwrapped(optimizer: Any) -> Any:
    """The optimiser whose steps run hooks. Accelerate's and Lightning's wrappers have it in their attribute `optimizer`."""
    inner = getattr(optimizer, "optimizer", None)
    passes_on = isinstance(inner, Optimizer) and not _runs_hooks(optimizer) and "state" not in vars(optimizer)
    return unwrapped(inner) if passes_on else optimizer


def _runs_hooks(optimizer: Any) -> bool:
    return getattr(type(optimizer).step, "hooked", False) and hasattr(optimizer, "_optimizer_step_post_hooks")


def number_parts_(optimizers: Sequence[Optimizer]) -> None:
    """Number the parts of each optimiser's groups from 0 on, so that equal runs save equal states."""
    for optimizer in optimizers:
        numbers: dict[Any, int] = {}
        for group in optimizer.param_groups:
            if PART in group:
                group[PART] = numbers.setdefault(group[PART], len(numbers))
