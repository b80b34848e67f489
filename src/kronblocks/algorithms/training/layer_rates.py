"""LayerRates: in an optimiser's steps, every sparse layer has the rate that its density and its factors ask for."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from kronblocks.algorithms.moments import with_inner
from kronblocks.algorithms.rates import Kind, Rates, Scales, kind_of
from kronblocks.algorithms.targets import BlockTarget
from kronblocks.algorithms.training.places import same
from kronblocks.algorithms.training.rate_parts import RATES, Parts
from kronblocks.algorithms.training.stand_in import Group, StandIn, stand_in_for
from kronblocks.core.checks import one_of
from kronblocks.core.errors import KronblocksError, KronblocksWarning


class _Cut(NamedTuple):
    """An optimiser's groups in parts, and what they were cut by. The objects of a step stay, as compiled steps like it."""

    parts: Parts
    stand_in: Any
    changes: int
    held: Sequence[Tensor]


class LayerRates:
    """The rates of a sparsifier's layers, in the groups that `parameter_groups` made or that have its key "rates".

    Around each step, hooks give the optimiser a stand-in whose groups are cut into parts. So the user's groups stay as they
    are: schedulers, states and errors in a step see plain rates.

    Args:
        targets: the sparsifier's list of its layers.
    """

    def __init__(self, targets: list[BlockTarget]) -> None:
        self._targets = targets
        self._scales: dict[str, Scales] = {}
        self._masks: dict[str, tuple[Tensor, int | None]] = {}  # as they were when live blocks were counted
        self._cuts: dict[int, _Cut] = {}  # by optimiser
        self._running: dict[int, Parts] = {}
        self._changes, self._warned = 0, False

    def __getstate__(self) -> dict[str, Any]:  # a copy is attached to no optimiser
        return {**self.__dict__, "_masks": {}, "_cuts": {}, "_running": {}}

    def attach_(self, optimizers: Sequence[Optimizer]) -> list[Any]:
        """Hook the steps of optimisers, or those of the optimisers that they wrap. Returns handles, to remove all this."""
        before: Any = torch.compiler.disable(self.before_step)
        after: Any = torch.compiler.disable(self.after_step)
        handles: list[Any] = [self]
        for optimizer in with_inner(optimizers):
            if with_inner([optimizer]) == [optimizer]:
                handles += [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
                hooks: Any = optimizer._optimizer_step_post_hooks
                hooks.move_to_end(handles[-1].id, last=False)  # the last to begin is the first to end
        return handles

    def remove(self) -> None:
        """Forget the optimisers."""
        self._cuts, self._running = {}, {}

    def before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A step pre-hook: the step's arguments with a stand-in for the optimiser, if any rate differs from its group's."""
        if isinstance(optimizer, StandIn):  # the step of a base class, inside
            return None
        self._running.pop(id(optimizer), None)
        groups = args[0].param_groups  # perhaps another sparsifier's stand-in
        if not any(RATES in group for group in groups):
            return None
        self._follow()
        held = [p for target in self._targets for p in target.parameters()]
        cut = self._cuts.get(id(optimizer))
        is_of = cut is not None and same(held, cut.held) and cut.parts.is_of(groups)
        if cut is None or not is_of or cut.changes != self._changes:
            factors = self._factors(optimizer, groups)
            parts = cut.parts if cut is not None and is_of and cut.parts.change_(factors) else Parts(groups, factors)
            stand_in = stand_in_for(optimizer, []) if cut is None else cut.stand_in
            cut = self._cuts[id(optimizer)] = _Cut(parts, stand_in, self._changes, held)
        if cut.parts.are_whole:
            return None
        self._running[id(optimizer)] = cut.parts
        cut.stand_in.groups[:] = cut.parts.begin()
        return (cut.stand_in, *args[1:]), kwargs

    def after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A step post-hook: keep what the step has written into its groups."""
        parts = self._running.pop(id(optimizer), None)
        if parts is None:
            return
        parts.end()
        if not isinstance(args[0], StandIn) and not self._warned:
            self._warned = True
            warnings.warn(
                f"another step pre-hook has replaced the first argument of {type(optimizer).__name__}.step, so sparse layers are "
                "stepped at the plain rate: return (args[0], ...) in it, not the optimiser",
                KronblocksWarning,
                stacklevel=2,
            )

    def _follow(self) -> None:
        """Look at layers whose number of live blocks has changed."""
        for target in self._targets:
            mask = target.mask
            version = None if mask.is_inference() else mask._version
            then, counted = self._masks.get(target.name, (None, None))
            if then is mask and version is not None and version == counted:
                continue
            self._masks[target.name] = mask, version
            live, known = int(mask.sum()), self._scales.get(target.name)
            if known is None or known.live != live or (known.coeff > 0) != target.is_factored:
                self._scales[target.name] = Scales.of(target.module, target.grid, live)
                self._changes += 1

    def _factors(self, optimizer: Optimizer, groups: Sequence[Group]) -> dict[int, float]:
        """The rates of an optimiser's parameters, by id, relative to their group's."""
        asked = {id(p): group[RATES] for group in groups if RATES in group for p in group["params"]}
        own = kind_of(optimizer)
        found = {}
        for target in self._targets:
            for name, p in _named(target).items():
                if id(p) in asked:
                    found[id(p)] = self._factor(target, name, own if asked[id(p)] == "auto" else asked[id(p)])
        return found

    def _factor(self, target: BlockTarget, name: str, kind: Kind) -> float:
        rank, banks = (getattr(target.module, key, None) or 1 for key in ("rank", "tile_groups"))
        return self._scales[target.name].factor(name, kind, target.grid, rank, banks)

    def now(self, optimizers: Sequence[Optimizer]) -> dict[str, float]:
        """The learning rate of each block parameter at the coming step, by its full name."""
        self._follow()
        rates = {}
        for optimizer in with_inner(optimizers):
            factors = self._factors(optimizer, optimizer.param_groups)
            base = {id(p): group.get("lr") for group in optimizer.param_groups for p in group["params"]}
            for target in self._targets:
                for name, p in _named(target).items():
                    if (rate := base.get(id(p))) is not None:
                        rates[f"{target.name}.{name}"] = float(rate) * factors.get(id(p), 1.0)
        return rates

    def state_dict(self) -> dict[str, dict[str, float]]:
        """What the rates follow from, as plain values: a resumed training has the same rates to the bit."""
        return {name: asdict(scales) for name, scales in self._scales.items()}

    def load_state_dict(self, state: Any) -> None:
        """Go on from a saved state; None: rates follow from the layers as they are."""
        self._scales, self._masks = parsed_rates(state), {}
        self._changes += 1


def check_rates(optimizers: Sequence[Optimizer]) -> None:
    """Raise KronblocksError if a group of an optimiser asks for rates that are unknown."""
    for optimizer in with_inner(optimizers):
        for group in optimizer.param_groups:
            one_of(f'"{RATES}" in a group of {type(optimizer).__name__}', group.get(RATES, "plain"), Rates)


def _named(target: BlockTarget) -> dict[str, Tensor]:
    """The parameters that hold a layer's blocks, by their names in the layer."""
    names = {id(p): name for name, p in target.module.named_parameters()}
    return {names[id(p)]: p for p in target.parameters() if id(p) in names}


def parsed_rates(state: Any) -> dict[str, Scales]:
    """What `LayerRates.state_dict` gave.

    Raises:
        KronblocksError: it is something else.
    """
    try:
        found = {
            name: Scales(int(each["live"]), float(each["coeff"]), float(each["tiles"])) for name, each in (state or {}).items()
        }
        if not all(scales.live >= 0 and scales.coeff >= 0 and scales.tiles >= 0 for scales in found.values()):
            raise ValueError(state)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise KronblocksError("the rates in the state are damaged: save sparsifier.state_dict() again") from error
    return found
