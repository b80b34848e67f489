"""The tie between a sparsifier and the user's optimisers: which ones may be followed, and how it is undone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import nn
from torch.optim import LBFGS, Optimizer

from kronblocks.errors import KronblocksError
from kronblocks.sparsity.targets import BlockTarget


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


def check_optimizers(optimizers: Sequence[Optimizer], sparsifier: _Follows) -> None:
    """Refuse optimisers that a sparsifier cannot follow.

    Raises:
        KronblocksError: LBFGS, an optimiser whose steps run no hooks, flattened weights, a targeted parameter in none of
            the optimisers, or one whose layers another sparsifier follows.
    """
    if not optimizers or not all(isinstance(optimizer, Optimizer) for optimizer in optimizers):
        raise KronblocksError("attach wants a torch optimiser or a list of them: sparsifier.attach(optimizer, total_steps=...)")
    for optimizer in optimizers:
        if not getattr(type(optimizer).step, "hooked", False):
            raise KronblocksError(
                f"steps of {type(optimizer).__name__} run no hooks, by which a sparsifier follows them: its __init__ has to call "
                "super().__init__(params, defaults), as torch's optimisers do"
            )
    if any(isinstance(optimizer, LBFGS) for optimizer in optimizers):
        raise KronblocksError(
            "LBFGS calls its closure several times in one step and expects a fixed set of weights, so its line search and a "
            "changing mask do not go together: use AdamW, SGD or another optimiser of one gradient per step"
        )
    if both := _followed_already(optimizers, sparsifier):
        raise KronblocksError(
            f"another sparsifier follows {', '.join(both[:5])} on this optimiser already: call remove() on the "
            "handle of its attach first, and make a new optimiser after sparsify_"
        )
    if flattened := [target.name for target in sparsifier.targets if _is_flattened(target)]:
        raise KronblocksError(
            f"the weights of {', '.join(flattened[:5])} have been flattened, as FullyShardedDataParallel does: use fully_shard, "
            "which leaves them their shape"
        )
    if missing := _not_held(optimizers, sparsifier.targets):
        raise KronblocksError(
            f"no optimiser holds the parameters of {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}: make the "
            "optimiser after sparsify_, from kronblocks.parameter_groups(model, lr=...) or model.parameters()"
        )


def check_held(optimizers: Sequence[Optimizer], targets: Sequence[BlockTarget]) -> None:
    """Refuse to go on where layers have got parameters in a training that no optimiser has.

    Raises:
        KronblocksError: there are any.
    """
    if missing := _not_held(optimizers, targets):
        raise KronblocksError(
            f"{', '.join(missing[:5])} {'has' if len(missing) == 1 else 'have'} parameters now that no optimiser holds, which "
            "would stay as they are: give the optimiser to what replaces layers, as in lift_(model, optimizer), or make "
            "optimiser and sparsifier again after replacing layers or weights"
        )


def _not_held(optimizers: Sequence[Optimizer], targets: Sequence[BlockTarget]) -> list[str]:
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    return [target.name for target in targets if any(p.requires_grad and id(p) not in held for p in target.parameters())]


def _is_flattened(target: BlockTarget) -> bool:
    try:
        return any(p.dim() < 2 for p in target.parameters())
    except AttributeError:  # they are not even there
        return True


def _followed_already(optimizers: Sequence[Optimizer], sparsifier: _Follows) -> list[str]:
    """Names of the layers that another sparsifier of the same model follows through one of these optimisers."""
    hooks = [hook for optimizer in optimizers for hook in optimizer._optimizer_step_post_hooks.values()]
    others = [owner for hook in hooks if isinstance(owner := getattr(inspect.unwrap(hook), "__self__", None), type(sparsifier))]
    theirs = {target.name for other in others if other.model is sparsifier.model for target in other.targets}
    return [target.name for target in sparsifier.targets if target.name in theirs]


def unwrapped(optimizer: Any) -> Any:
    """The optimiser whose steps run hooks: Accelerate and Lightning keep it in `optimizer` of their wrappers."""
    inner = getattr(optimizer, "optimizer", None)
    return unwrapped(inner) if isinstance(inner, Optimizer) else optimizer
