"""Planner: chooses the plan of each layer during a training, again when masks change. It seldom switches."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import distributed
from torch.utils.hooks import RemovableHandle

from kronblocks.algorithms.protocol import HasPlans, has_plans
from kronblocks.algorithms.schedule import SparsitySchedule
from kronblocks.algorithms.targets import BlockTarget
from kronblocks.algorithms.training.traffic import Traffic, Watch, checked_traffic
from kronblocks.core.errors import KronblocksError, KronblocksWarning
from kronblocks.core.processes import is_shared
from kronblocks.ops.costs.choice import plan_seconds
from kronblocks.ops.costs.timing import candidates
from kronblocks.ops.costs.timing_cache import Tables, load_tables

MARGIN = 1.1
"""A layer switches plans only if the present one is this many times slower than the best."""

COMPILED_MARGIN = 1.25
"""The same for all layers of a compiled model together, since each switch costs compilations."""


class _Chooser(NamedTuple):
    name: str
    layer: HasPlans


class _Choice(NamedTuple):
    plan: str
    present: float  # seconds per step by the present plan
    seconds: float  # seconds per step by this plan


def measuring_allowed() -> bool:
    """Whether trainings may time plans. `KRONBLOCKS_MEASURE=0` (or off) forbids it; then counts decide."""
    return os.environ.get("KRONBLOCKS_MEASURE", "").lower() not in ("0", "off")


class Planner:
    """Chooses the plans of the layers that leave it to the library (`plan="auto"`).

    Args:
        measure: choose by timings of this machine; False: by estimates from the counts.
        rows: rows of x per step; None: those of each layer's first training step.
    """

    def __init__(self, *, measure: bool = True, rows: int | None = None) -> None:
        self._measure, self._rows = measure, rows
        self.checked_traffic: dict[str, Traffic] = {}
        self._chosen: set[str] = set()  # layers whose present plan was chosen here: `MARGIN` applies
        self._tables: Tables = {}  # the timings that were used
        self._watches: dict[str, tuple[Watch, RemovableHandle]] = {}
        self._compiled = False  # whether a layer is in compiled code
        self._changes = 0  # how often compiled code has changed, all layers together

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_watches": {}}

    def watch(self, targets: Sequence[BlockTarget]) -> list[RemovableHandle]:
        """Hook the next training steps to note the layers' inputs; returns the hooks' handles."""
        for target in (target for target in targets if not target.is_plain):
            watch = Watch(in_convolution=getattr(target.module, "convolution", None) is not None)
            handle = target.module.register_forward_pre_hook(watch, with_kwargs=True)
            self._watches[target.name] = (watch, handle)
        return [handle for _, handle in self._watches.values()]

    def forget_choices(self) -> None:
        """Forget which plans were chosen here, after layers were replaced and have the constructors' plans."""
        self._chosen.clear()

    def allows_change(self, to_come: int = 0) -> bool:
        """Whether compiled code may change once more within torch's limit of recompilations.

        Args:
            to_come: number of later changes that are certain.
        """
        return not self._compiled or self._changes + to_come < _most_changes()

    def decide(self, targets: Sequence[BlockTarget], *, changed: bool = False, to_come: int = 0) -> None:
        """Choose every layer's plan for its present density, and switch to it.

        Plans are part of compiled code. There all layers switch together, if it pays, and within torch's limit.
        In distributed training rank 0 decides for all, since timings differ between ranks.

        Args:
            targets: the layers.
            changed: whether layers have just been replaced or made smaller, so that code is compiled again anyway.
            to_come: number of such changes that come later.
        """
        choosers = _choosers(targets)
        lift_to_come = to_come if any(target.is_factored for target in targets) else 0  # values may stay as large as they are
        self._note_traffic(changed + lift_to_come)
        if self._compiled:
            for target in targets:
                if has_plans(target.layer):
                    target.layer.keep_index_size_()
        if not choosers or not (changed or self.allows_change(to_come)):
            self._changes += self._compiled and changed
            return
        self._tell_rows(choosers)
        shared = is_shared()
        plans = self._best_of_all(choosers, changed) if not shared or distributed.get_rank() == 0 else []
        if shared:
            box = [plans]
            distributed.broadcast_object_list(box, src=0)
            plans = box[0]
        pairs = zip(choosers, plans, strict=True)
        switches = [(layer, plan) for (_, layer), plan in pairs if plan != layer.active_plan]
        for layer, plan in switches:
            layer.use_plan_(plan)
        self._changes += self._compiled and (changed or bool(switches))

    def _note_traffic(self, changes: int) -> None:
        """Read what the hooks noted. `changes` is the number of certain changes of compiled code."""
        for name, (watch, handle) in list(self._watches.items()):
            traffic = watch.traffic()
            if traffic is not None:
                self.checked_traffic.setdefault(name, traffic)
                if watch.compiled and not self._compiled:
                    self._compiled = True
                    _warn_of_a_low_limit(self._changes + changes)
                if not watch.compiled:  # removing a hook would compile the model again
                    handle.remove()
                del self._watches[name]

    def _tell_rows(self, choosers: Sequence[_Chooser]) -> None:
        """Tell the layers how many rows of x they get, since replaced layers choose a plan themselves, and of what images."""
        for name, layer in choosers:
            layer.rows = self._rows_of(name) or layer.rows
            traffic, around = self.checked_traffic.get(name), getattr(layer, "convolution", None)
            if around is not None and traffic is not None and traffic.size is not None:
                layer.convolution = around._replace(size=traffic.size)  # pyright: ignore[reportAttributeAccessIssue]

    def _rows_of(self, name: str) -> int | None:
        traffic = self.checked_traffic.get(name)
        return self._rows or (None if traffic is None else traffic.rows)

    def _best_of_all(self, choosers: Sequence[_Chooser], changed: bool) -> list[str]:
        """The plan for each layer. In compiled code that is the present one, unless all switches together gain enough."""
        choices = [self._best(*chooser) for chooser in choosers]
        present, best = sum(choice.present for choice in choices), sum(choice.seconds for choice in choices)
        if self._compiled and not changed and present < COMPILED_MARGIN * best:
            return [chooser.layer.active_plan for chooser in choosers]
        self._chosen.update(
            chooser.name for chooser in choosers if chooser.name in self.checked_traffic or self._rows is not None
        )
        return [choice.plan for choice in choices]

    def _best(self, name: str, layer: HasPlans) -> _Choice:
        traffic, plan = self.checked_traffic.get(name), layer.active_plan
        if traffic is None and self._rows is None:
            return _Choice(plan, 0.0, 0.0)  # its input is not known yet
        problem = layer.problem(rows=self._rows_of(name), input_grad=traffic is None or traffic.input_grad)
        if traffic is not None:
            problem = replace(problem, dtype=getattr(torch, traffic.dtype))
        running = candidates(problem)
        measure = self._measure and measuring_allowed() and len(running) > 1
        seconds = plan_seconds(problem, measure=True, record=self._tables) if measure else {}
        if not seconds:
            estimated = plan_seconds(problem, measure=False)
            seconds = {plan: estimated[plan] for plan in running}
        best = min(seconds, key=seconds.__getitem__)
        present = seconds.get(plan, float("inf"))
        if name in self._chosen and present < MARGIN * seconds[best]:
            return _Choice(plan, present, present)
        return _Choice(best, present, seconds[best])

    def state_dict(self) -> dict[str, Any]:
        """What later decisions depend on, as plain values."""
        return {
            "traffic": {name: traffic.values() for name, traffic in self.checked_traffic.items()},
            "chosen": sorted(self._chosen),
            "tables": {key: dict(table) for key, table in self._tables.items()},
            "changes": self._changes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as if this process had made the saved decisions, with their timings.

        Raises:
            KronblocksError: it is no state of a planner; nothing has changed then.
        """
        self.checked_traffic, self._chosen, self._tables, self._changes = parsed(state)
        load_tables(self._tables)


def parsed(state: Mapping[str, Any]) -> tuple[dict[str, Traffic], set[str], Tables, int]:
    """Read what `Planner.state_dict` gave: inputs by layer, layers with chosen plans, timings, changes of compiled code.

    Raises:
        KronblocksError: it is something else.
    """
    try:
        traffic = {str(name): checked_traffic(*values) for name, values in state["traffic"].items()}
        chosen = {str(name) for name in state["chosen"]}
        tables = {str(key): dict(table) for key, table in state["tables"].items()}
        changes = state.get("changes", 0)  # older states lack it
        if type(changes) is not int or changes < 0:
            raise ValueError(f"{changes!r} changes")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise KronblocksError(f"the state's part on plans is damaged ({error!r}): save sparsifier.state_dict() again") from error
    return traffic, chosen, tables, changes


def _choosers(targets: Sequence[BlockTarget]) -> list[_Chooser]:
    return [_Chooser(each.name, each.layer) for each in targets if has_plans(each.layer) and each.layer.plan == "auto"]


_WITHOUT_CHANGES, _OF_A_CHANGE = 4, 2
"""Compilations of a model, and of each change of it. Training and evaluation are each compiled for a fixed number of rows, then
for any number. Later changes are compiled for any number only.
"""


def _most_changes() -> int:
    """How often a compiled model may change within torch's limit of recompilations."""
    return (_recompile_limit() - _WITHOUT_CHANGES) // _OF_A_CHANGE


def _recompile_limit() -> int:
    import torch._dynamo  # called only if it has compiled something

    return torch._dynamo.config.recompile_limit


def _warn_of_a_low_limit(changes: int) -> None:
    """Warn if the certain number of changes is more than torch will compile."""
    if changes > _most_changes():
        wanted = _WITHOUT_CHANGES + _OF_A_CHANGE * changes
        warnings.warn(
            f"torch compiles this model up to {wanted} times in the training: whenever its layers are replaced, for training and "
            f"for evaluation. But torch._dynamo.config.recompile_limit is {_recompile_limit()}, and beyond that the model runs "
            f"uncompiled. Set the limit to {wanted} or more before the training",
            KronblocksWarning,
            stacklevel=2,
        )


def layer_changes_to_come(schedule: SparsitySchedule, step: int, targets: Sequence[BlockTarget]) -> int:
    """How often layers will still be replaced, or made smaller if that is worth a compilation."""
    if step >= schedule.end_step:
        return 0
    if schedule.lift_step is not None:  # a lift leaves few slots to free later
        return int(step < schedule.lift_step)
    shrinks = schedule.sparsity_at(schedule.end_step) > schedule.sparsity_at(step)
    return int(shrinks and any(not target.is_plain and not target.is_factored for target in targets))
