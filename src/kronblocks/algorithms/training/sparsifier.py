"""Sparsifier: after each step of an optimiser, it applies a rule by a schedule and keeps zeros exact."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kronblocks.algorithms.budget import Scope
from kronblocks.algorithms.context import context_at, learning_rates, score_of
from kronblocks.algorithms.growth import EagerSteps
from kronblocks.algorithms.heads import Heads
from kronblocks.algorithms.rules.base import Rule, RuleContext, RuleState, checked
from kronblocks.algorithms.rules.fixed import Fixed
from kronblocks.algorithms.schedule import Phase, SparsitySchedule, continued
from kronblocks.algorithms.targets import BlockTarget
from kronblocks.algorithms.training.added_penalty import AddedPenalty, warn_of_missing_penalty
from kronblocks.algorithms.training.attachment import Attachment, check_optimizers, number_parts_, unwrapped
from kronblocks.algorithms.training.carried import CarriedState
from kronblocks.algorithms.training.following import Movement, Turns, keep_zeros_
from kronblocks.algorithms.training.layer_rates import LayerRates, check_rates
from kronblocks.algorithms.training.nested import is_nested
from kronblocks.algorithms.training.places import Places
from kronblocks.algorithms.training.planning import Planner, layer_changes_to_come
from kronblocks.algorithms.training.report import (
    SparsityReport,
    count_blocks,
    dead_share,
    warn_if_missed,
    warn_if_too_dense,
    warn_of_starved_layers,
)
from kronblocks.algorithms.training.state import STATE_VERSION, check_state, layers_state, load_layers_state_
from kronblocks.algorithms.training.surgeon import LIFT_WAITS, Surgeon
from kronblocks.algorithms.training.unfollowed import LOST, NOT_ATTACHED, is_attached, is_detached, wait_for_attach
from kronblocks.core.errors import KronblocksError, KronblocksWarning
from kronblocks.core.processes import agreed, averaged, is_shared
from kronblocks.core.shards import is_sharded


class Sparsifier:
    """Runs one algorithm during a training, by hooks on the user's optimiser. `kronblocks.sparsify_` makes it.

    Args:
        model: the model whose layers are targeted.
        targets: the layers, in the model's order.
        rule: the algorithm.
        make_schedule: returns the schedule for a number of steps.
        surgeon: replaces layers at the lift, and frees slots when healing begins.
        scope: one budget over all layers ("global"), or one for each ("layer").
        planner: chooses the plans of layers with plan "auto", after the first step and whenever masks change.
        heads: names of the targets that make the model's output; None: they are found in the first steps.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[BlockTarget],
        rule: Rule,
        make_schedule: Callable[[int], SparsitySchedule],
        surgeon: Surgeon,
        *,
        scope: Scope = "global",
        planner: Planner | None = None,
        heads: Sequence[str] | None = None,
    ) -> None:
        self.model, self.rule = model, rule
        self._places = Places(model, targets)
        self.targets = self._places.targets
        self.scope: Scope = scope
        self.step = 0
        self.schedule: SparsitySchedule | None = None
        self.surgery = surgeon.report
        self._surgeon, self._make_schedule, self._planner = surgeon, make_schedule, planner or Planner()
        self._optimizers: list[Optimizer] = []
        self._turns, self._movement, self._rates = Turns((), ()), Movement(), LayerRates(self.targets)
        self._rule_state: RuleState = {}
        self._known_steps: int | None = None  # total_steps of the training so far
        self._awaits_penalty = False
        self._eager, self._heads = EagerSteps(), Heads([target.name for target in self.targets], heads)
        self._handles: list[Any] = []  # of all hooks since `attach`
        self._was_removed = False
        self.initial_sparsity = dead_share(self.targets)
        self._has_dead = self.initial_sparsity > 0
        wait_for_attach(self)

    def attach(
        self,
        optimizers: Optimizer | Sequence[Optimizer],
        *,
        total_steps: int,
        add_penalty: bool = False,
        ddp: nn.Module | None = None,
    ) -> Attachment:
        """Follow these optimisers' steps from now on.

        Args:
            optimizers: one or several, which together hold every targeted parameter. Each one that holds some steps once per
                training step. Wrappers of Accelerate and Lightning are accepted.
            total_steps: optimiser steps of the whole training, as for a learning-rate schedule.
            add_penalty: add the penalty's gradient before each step, after clipping, for a training loop whose loss cannot be
                changed. Leave `penalty()` out of the loss then.
            ddp: the DistributedDataParallel around the model; None: it is looked for, once, among all objects of the process.

        Returns:
            A handle whose `remove()` undoes this.

        Raises:
            KronblocksError: it is attached already; `total_steps` differs from that of a loaded state whose mask is not frozen;
                `ddp` does not contain the model; or it cannot follow the optimisers (see `check_optimizers`).
        """
        if self._optimizers:
            raise KronblocksError("this sparsifier is attached already: call remove() on the handle of the first attach")
        optimizers = [unwrapped(each) for each in (optimizers if isinstance(optimizers, Sequence) else [optimizers])]
        self._follow_layers(strict=True)
        schedule = self._schedule_for(total_steps, self._known_steps, self.step, self.initial_sparsity)
        check_optimizers(optimizers, self, lifts=schedule.lift_step is not None and not self._is_sharded)
        check_rates(optimizers)
        if self._is_sharded and self.rule.has_penalty:
            raise KronblocksError(
                'the penalty needs whole weights, but these are sharded: use PenaltyConfig(form="proximal"), which '
                "acts on the blocks after each step"
            )
        if self.targets and not schedule.prunes:
            warnings.warn(f"{schedule.why_not}: nothing is pruned in this run", KronblocksWarning, stacklevel=2)
        self._places.attach_(ddp)
        self.schedule, self._known_steps = schedule, schedule.total_steps
        self._optimizers, self._was_removed = optimizers, False
        number_parts_(optimizers)
        self._turns = Turns(optimizers, self.targets)
        if is_shared():
            for target in self.targets:
                target.share_mask_()
        after = torch.compiler.disable(self._after_step)  # for compiled optimiser steps
        self._handles = [optimizer.register_step_post_hook(after) for optimizer in optimizers]
        if add_penalty and self.rule.has_penalty:
            self._handles += AddedPenalty(self.penalty).attach_(optimizers)
        self._awaits_penalty = self.rule.has_penalty and bool(self.targets)
        self._handles += [*self._rates.attach_(optimizers), *self._places.note_parameters_(optimizers)]
        self._handles += self._planner.watch(self.targets)
        self._handles += self._heads.watch(self.model, [target.module for target in self.targets])
        self._prepare_probes()
        is_attached(self, optimizers)
        return Attachment(self._handles, self._detach)

    def _schedule_for(self, total_steps: int, known: int | None, step: int, before: float) -> SparsitySchedule:
        """The schedule. It starts from the sparsity before any training, but from no more than the target."""
        schedule = continued(self._make_schedule, total_steps, known, step)
        return replace(schedule, initial_sparsity=max(min(before, schedule.target_sparsity), schedule.initial_sparsity))

    def _detach(self) -> None:
        self._eager.end()
        for target in self.targets:
            target.drop_probe()
        self._places.detach_()
        self._optimizers, self._handles, self.schedule, self._was_removed = [], [], None, True
        is_detached(self)
        if self.without_attach():
            wait_for_attach(self)

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)
        if (found_inf is not None and bool(found_inf)) or is_nested(optimizer):  # skipped under a GradScaler, or not over yet
            return
        self._follow_layers(strict=True)
        self._handles += self._places.note_parameters_(self._optimizers)
        if self._has_dead:
            keep_zeros_(self.targets, optimizer)
        if self._turns.end(optimizer, self.step):
            self._advance()
            self._turns.begin(self.targets)

    @torch.no_grad()
    def _advance(self) -> None:
        self.step += 1
        self._eager.end()
        schedule = self.schedule
        if self._awaits_penalty:
            self._awaits_penalty = False
            warn_of_missing_penalty(self.rule)
        if not self.targets or schedule is None:
            return
        self._movement.check(self.targets, learning_rates(self.targets, self._optimizers))
        update = schedule.is_update(self.step)
        if update or (self.rule.every_step and schedule.start_step < self.step < schedule.end_step):
            self._apply_rule(update)
        if self._heads.want_eager_step():
            self._eager.begin()
        changed = False
        if self.step == schedule.lift_step:
            if self._is_sharded:
                warnings.warn(LIFT_WAITS, KronblocksWarning, stacklevel=2)
            else:
                changed = True
                self.lift_()
        if self.step == schedule.end_step and not self._is_sharded and (changed or self._planner.allows_change()):
            changed = self._compact() or changed
        if update or self.step == 1:  # after the first step the inputs of layers are known
            to_come = 0 if self._is_sharded else layer_changes_to_come(schedule, self.step, self.targets)
            self._planner.decide(self.targets, changed=changed, to_come=to_come)
        self._prepare_probes()

    def _apply_rule(self, update: bool) -> None:
        self._heads.decide(self.targets[0].mask.device)
        context = self._context(self.step)
        scores = agreed([target.scores(context.score) for target in self.targets], self.step)
        growth = averaged([target.read_probe() for target in self.targets]) if update and self.rule.needs_growth else None
        answer = self.rule.propose(scores, growth, self._rule_state, context)
        proposed, self._rule_state = checked(answer, self.rule, context)
        for target, each in zip(self.targets, proposed, strict=True):
            died, grown = target.apply_(each)
            if died.any():
                self._has_dead = True
                target.end_moments_(self._optimizers, died)
            if grown.any():
                target.restart_moments_(self._optimizers, grown)
        if context.is_last_update:
            assert self.schedule is not None
            report = self.report()
            warn_if_missed(report, self.schedule, type(self.rule).__name__)
            warn_of_starved_layers(report)

    def _context(self, step: int) -> RuleContext:
        assert self.schedule is not None
        about = {"heads": self._heads.names or (), "scope": self.scope, "score": score_of(self.rule, self.targets)}
        return context_at(step, self.schedule, self.targets, self._optimizers, **about)

    def _follow_layers(self, *, strict: bool = False) -> None:
        if self._places.follow_(strict=strict):
            self._planner.forget_choices()

    def _prepare_probes(self) -> None:
        if self.measures_growth:
            self._eager.begin()
            for target in self.targets:
                target.start_probe()

    def lift_(self) -> None:
        """Replace factors by free block values, in the model and in its optimisers.

        The two-phase method calls this at the right step. Sharded parameters cannot be replaced: when `lift_due` says so,
        save a checkpoint, build the model again, load, call this, and then shard it.

        Raises:
            KronblocksError: the parameters are sharded.
        """
        if self._is_sharded:
            raise KronblocksError(LIFT_WAITS)
        if self._surgeon.lift([target.name for target in self.targets], self._optimizers):
            self._follow_replaced()

    def _compact(self) -> bool:
        """Free the slots of dead blocks. Whether there were any."""
        if compacted := self._surgeon.compact([target.name for target in self.targets], self._optimizers):
            self._follow_replaced()
        return compacted

    def _follow_replaced(self) -> None:
        self._follow_layers()
        self._places.tell_wrappers_()
        if self._optimizers:
            self._movement.watch(self.targets, self.step)

    def penalty(self) -> Tensor:
        """The rule's term for the loss: `loss + sparsifier.penalty()`. Zero for rules without one.

        Raises:
            KronblocksError: the sparsifier is not attached yet.
        """
        if self.schedule is None:
            raise KronblocksError("penalty() needs the schedule: call sparsifier.attach(optimizer, total_steps=...) first")
        self._awaits_penalty = False
        wanted = self.rule.has_penalty and self.targets
        term = self.rule.penalty(self.targets, self._context(self.step)) if wanted else None
        return torch.zeros((), device=next(self.model.parameters()).device) if term is None else term

    @property
    def phase(self) -> Phase:
        """ "discover", "refine" or "heal". Before the first `attach` it is "discover", after a training the last one."""
        schedule = self.schedule
        if schedule is None and self._known_steps is not None:
            schedule = self._make_schedule(self._known_steps)
        return "discover" if schedule is None else schedule.phase_at(self.step)

    @property
    def lift_to_come(self) -> bool:
        """Whether factors will become free values in the training that it is attached to."""
        return self._steps_to_lift is not None

    @property
    def lift_due(self) -> bool:
        """Whether the lift is due but has to wait because parameters are sharded; see `lift_`."""
        return self._steps_to_lift is not None and self._steps_to_lift <= 0

    @property
    def _steps_to_lift(self) -> int | None:
        lift_step = self.schedule.lift_step if self.schedule is not None else None
        return None if lift_step is None or not any(t.is_factored for t in self.targets) else lift_step - self.step

    @property
    def measures_growth(self) -> bool:
        """Whether the coming step measures the dense gradient of every targeted layer, to score dead blocks."""
        return self.rule.needs_growth and self.schedule is not None and self.schedule.is_update(self.step + 1)

    @property
    def masks_linears(self) -> bool:
        """Whether there are plain nn.Linear targets, whose masks the sparsifier keeps."""
        return any(target.is_plain for target in self._places.now().targets)

    @property
    def _is_sharded(self) -> bool:
        return any(is_sharded(parameter) for target in self.targets for parameter in target.parameters())

    @property
    def sparsity(self) -> float:
        """Share of the targeted weights in blocks of exact zeros, counted from the weights."""
        return self.report().block_sparsity

    def report(self) -> SparsityReport:
        """Count the zero blocks of every targeted layer now. Layers replaced after `sparsify_` are only named."""
        targets, gone = self._places.now()
        notes = [f"not counted, since it was replaced after sparsify_: {name} ({there})" for name, there in gone.items()]
        if not self._optimizers and self.without_attach():
            notes.append("the sparsifier is not attached: steps of an optimiser prune nothing")
        return count_blocks([target for target in targets if target.name not in gone], notes, self._heads)

    def learning_rates(self) -> dict[str, float]:
        """The learning rate of each block parameter at the next step. Groups show the dense rate (see `parameter_groups`)."""
        return self._rates.now(self._optimizers)

    def without_attach(self) -> str:
        """Why the layers should not be trained while it is not attached; empty if they may be."""
        loses_zeros = self._has_dead and self.masks_linears
        is_over = self._was_removed or isinstance(self.rule, Fixed) or not self.targets or self.phase == "heal"
        return "" if is_over and not loses_zeros else NOT_ATTACHED + LOST * loses_zeros

    def warn_if_too_dense(self, why: str) -> None:
        """Warn if a training has ended below its target; `why` is the reason."""
        if self.schedule is not None and self.schedule.prunes and self.targets:
            warn_if_too_dense(self.sparsity, self.schedule, why)

    def save_with_model(self) -> CarriedState:
        """Keep the state in `model.state_dict()` from now on, for trainers that save and load the model only.

        It is the tensor "kronblocks_state". `model.load_state_dict(...)` restores it, layers included. `remove()` on the
        handle ends this.
        """
        return CarriedState(self.model, self)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs beside the model's and the optimiser's states: plain values and tensors."""
        return {
            "version": STATE_VERSION,
            "rule": type(self.rule).__name__,
            "step": self.step,
            "total_steps": self._known_steps,
            "initial_sparsity": self.initial_sparsity,
            "rule_state": dict(self._rule_state),
            "structure": self._surgeon.record(),
            "planner": self._planner.state_dict(),
            "heads": self._heads.state_dict(),
            "rates": self._rates.state_dict(),
            **layers_state(self.targets),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state. Call this before `load_state_dict` of the model and optimiser.

        It first gives the model the layers that it had: after the lift these are other ones than `sparsify_` made.

        Raises:
            KronblocksError: the state is of another version, algorithm, model or number of steps.
        """
        check_state(state, rule=type(self.rule).__name__, targets=self.targets)
        step, known, before = state["step"], state["total_steps"], state.get("initial_sparsity", 0.0)
        schedule = None if self.schedule is None else self._schedule_for(self.schedule.total_steps, known, step, before)
        if self._surgeon.restore(state["structure"], self._optimizers):
            self._follow_layers()
            self._places.tell_wrappers_()
        load_layers_state_(self.targets, state)
        self._planner.load_state_dict(state["planner"])
        self._heads.load_state_dict(state.get("heads"))
        self._rates.load_state_dict(state.get("rates"))
        self.step, self._rule_state, self.initial_sparsity = step, dict(state["rule_state"]), before
        self.schedule, self._known_steps = schedule, known if schedule is None else schedule.total_steps
        self._has_dead = True
        self._prepare_probes()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles go on from the same step, but are not attached: torch's optimisers drop hooks when copied."""
        return {**self.__dict__, "_optimizers": [], "_turns": Turns((), ()), "_handles": [], "schedule": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        wait_for_attach(self)
