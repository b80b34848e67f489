"""`sparsify_` and `densify_`: replace a model's layers by block layers, and back."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kronblocks.algorithms.budget import check_reachable
from kronblocks.algorithms.masked import MaskedLinear
from kronblocks.algorithms.protocol import has_blocks
from kronblocks.algorithms.rules.base import Rule, check_rule
from kronblocks.algorithms.rules.fixed import Fixed
from kronblocks.algorithms.schedule import SparsitySchedule
from kronblocks.algorithms.targets import BlockTarget
from kronblocks.algorithms.training.attachment import check_not_followed, warn_of_hooks
from kronblocks.algorithms.training.places import target_now
from kronblocks.algorithms.training.planning import Planner
from kronblocks.algorithms.training.sparsifier import Sparsifier
from kronblocks.config.sparsity import SparsityConfig
from kronblocks.core.errors import KronblocksError
from kronblocks.nn.base import BlockLayer
from kronblocks.nn.block_sparse_linear import BlockSparseLinear
from kronblocks.nn.unfolded import Unfolded
from kronblocks.surgery.belongings import warn_of_lost_belongings
from kronblocks.surgery.lift import compact_, hand_over_, lift_layers_
from kronblocks.surgery.optimizers import in_order_of_
from kronblocks.surgery.records import apply_structure_, layers_of, structure
from kronblocks.surgery.replace import replace_, to_unfold, unfolding
from kronblocks.surgery.report import Selected, SurgeryReport
from kronblocks.surgery.selection import named_heads, select, warn_of_missed
from kronblocks.surgery.start import (
    first_init,
    first_layer,
    first_masks,
    plain_linear,
    present_masks,
    relative_error,
    warn_of_blocks_of_zeros,
    warn_of_dropped_weights,
    warn_of_rank,
)


def schedule_of(config: SparsityConfig) -> Callable[[int], SparsitySchedule]:
    """A function from a number of steps to the config's schedule."""
    return functools.partial(_schedule, config)  # unlike a local function it can be pickled


def _schedule(config: SparsityConfig, total_steps: int) -> SparsitySchedule:
    plan, choices, target = config.schedule, config.resolved(), config.target_sparsity
    lift_at = plan.lift_at if config.spec.is_lifted else None
    return SparsitySchedule(target, total_steps, plan.start, choices.end, lift_at, choices.shape, plan.update_every, plan.stages)


class ModelSurgeon:
    """The `Surgeon` of a `Sparsifier`; see `kronblocks.algorithms.training.surgeon`."""

    def __init__(self, model: nn.Module, report: SurgeryReport) -> None:
        self.report = report
        self._model = model

    def lift(self, names: Sequence[str], optimizers: Sequence[Optimizer]) -> bool:
        lifted = lift_layers_(self._model, names, optimizers)
        layers = {name: self._model.get_submodule(name) for name in lifted}
        warn_of_lost_belongings(layers, "the lift has replaced factors by values, so add it to the new layers")
        return bool(lifted)

    def compact(self, names: Sequence[str], optimizers: Sequence[Optimizer]) -> bool:
        return compact_(self._model, names, optimizers)

    def record(self) -> dict[str, Any]:
        return structure(self._model)

    def restore(self, record: dict[str, Any], optimizers: Sequence[Optimizer]) -> bool:
        before, ending, changed = layers_of(self._model, BlockLayer), {}, False
        apply_structure_(self._model, record)
        for name, old in before.items():
            new = self._model.get_submodule(name)
            if isinstance(new, BlockLayer) and new is not old:
                ending |= hand_over_(optimizers, name, old, new)
                changed = True
        warn_of_hooks(ending, "ended when layers were replaced")
        in_order_of_(optimizers, self._model)
        return changed


def sparsify_(model: nn.Module, config: SparsityConfig | None = None, *, rule: Rule | None = None) -> Sparsifier:
    """Make a model's linear layers block-sparse during its training, in place.

    Afterwards make the optimiser (from `parameter_groups` or `model.parameters()`) and call
    `sparsifier.attach(optimizer, total_steps=...)`. The rest happens in the optimiser's steps. `sparsifier.surgery` says which
    layers become sparse, which do not, and why.

    Layers that are block-sparse already keep their live blocks, and the schedule begins at their sparsity.

    Args:
        model: any module with nn.Linear layers or block layers; new or trained.
        config: the settings; the default is two-phase with 16x16 blocks to 90% zeros.
        rule: an algorithm of your own, which replaces the method's rule. Storage, schedule and lift stay the method's.

    Raises:
        KronblocksError: nothing is selected; a pattern is unknown; weights are not finite; the sparsity is impossible, or below
            the present one; another attached sparsifier has yet to prune the same layers. Nothing has changed then.

    >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16))
    >>> sparsifier = sparsify_(model, SparsityConfig(block_size=8, rank=2, target_sparsity=0.5))
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    >>> handle = sparsifier.attach(optimizer, total_steps=20)
    >>> for step in range(20):
    ...     loss = model(torch.randn(4, 64)).square().mean() + sparsifier.penalty()
    ...     optimizer.zero_grad()
    ...     loss.backward()
    ...     optimizer.step()
    >>> sparsifier.sparsity
    0.5
    """
    config = config or SparsityConfig()
    if not isinstance(model, nn.Module):
        raise KronblocksError(f"sparsify_ needs a model, an nn.Module, not {type(model).__name__}")
    if not isinstance(config, SparsityConfig):
        raise KronblocksError(
            f"sparsify_ needs a SparsityConfig, not {type(config).__name__}: SparsityConfig(block_size=16, ...)"
        )
    if rule is not None:
        check_rule(rule)
        _check_for_rule(config)
    rule = rule or config.rule()
    if rule is None:
        return _sparsified(model, config, SurgeryReport((), ()), Fixed())
    if torch.is_inference_mode_enabled():
        raise KronblocksError(
            "sparsify_ was called under torch.inference_mode(), where the parameters that it makes could never train: call it "
            "outside"
        )
    report = select(model, config)
    warn_of_missed(report)
    heads = named_heads(model, report, config)
    with unfolding(model, to_unfold(model, [each.name for each in report.selected])):
        return _sparsified(model, config, report, rule, heads)


def _check_for_rule(config: SparsityConfig) -> None:
    """Refuse settings that the user's own rule would ignore."""
    if config.spec.rule is None:
        raise KronblocksError(
            f"method {config.method!r} has no blocks for a rule: use another one, such as 'magnitude' for plain nn.Linear"
        )
    if given := [name for name in ("score", "regrow", "penalty") if getattr(config, name) != getattr(SparsityConfig, name)]:
        raise KronblocksError(f"{', '.join(given)}: your rule= decides that, so leave it out of the config")


def _sparsified(
    model: nn.Module, config: SparsityConfig, report: SurgeryReport, rule: Rule, heads: tuple[str, ...] | None = None
) -> Sparsifier:
    """Replace the selected layers, and make the sparsifier. `heads`: those that the user named."""
    check_not_followed([model.get_submodule(each.name) for each in report.selected])
    present = present_masks(model, report, config)
    if present:
        shapes, areas = [each.grid.shape for each in report.selected], [each.grid.block.area for each in report.selected]
        alive = [bool(mask.any()) for mask in present]
        check_reachable(shapes, areas, config.target_sparsity, config.scope, alive=alive)
    warn_of_dropped_weights(model, report, config)
    warn_of_blocks_of_zeros(model, report, config)
    masks = first_masks(model, report, config, present, heads)
    if config.spec.is_factored:
        warn_of_rank(report)
    report = _replace_layers(model, report, config, masks)
    targets = [_target(model, each) for each in report.selected]
    for target in targets:
        if target.is_plain:
            target.layer.set_block_mask_(masks[target.name])
    planner = Planner(measure=config.measure_plans, rows=config.rows)
    surgeon = ModelSurgeon(model, report)
    return Sparsifier(model, targets, rule, schedule_of(config), surgeon, scope=config.scope, planner=planner, heads=heads)


def _replace_layers(
    model: nn.Module, report: SurgeryReport, config: SparsityConfig, masks: Mapping[str, Tensor]
) -> SurgeryReport:
    """Replace every selected layer by what the method works on.

    Returns:
        The report, with the errors of layers that start from their present weights.
    """
    selected, replaced = [], {}
    for each in report.selected:
        old = model.get_submodule(each.name)
        init, is_meta = first_init(old, config), next(old.parameters(recurse=False)).is_meta
        new = first_layer(old, each, masks[each.name], config)
        if new is not old:
            replace_(model, each.name, new)
            replaced |= {each.name: new}
        around = model.get_submodule(each.name.rpartition(".")[0])
        replaced |= {each.name.rpartition(".")[0]: around} if isinstance(around, Unfolded) else {}
        if isinstance(new, BlockLayer) and new is not old and init == "nearest" and not is_meta:
            selected.append(dataclasses.replace(each, error=relative_error(old, new)))
        else:
            selected.append(each)
    warn_of_lost_belongings(replaced, "patch, hook, extend or dispatch layers after sparsify_")
    return dataclasses.replace(report, selected=tuple(selected))


def _target(model: nn.Module, selected: Selected) -> BlockTarget:
    layer = model.get_submodule(selected.name)
    if isinstance(layer, nn.Linear):
        return BlockTarget(selected.name, MaskedLinear(layer, selected.grid))
    assert has_blocks(layer)
    return BlockTarget(selected.name, layer)


def pack_masked_(copy: nn.Module, model: nn.Module, sparsifier: Sparsifier) -> None:
    """In a copy of a model, replace the plain layers that a sparsifier masks by packed ones.

    Args:
        copy: of the model.
        model: the sparsifier's model, a module around it, or a copy of it.
        sparsifier: the one that masks its layers.

    Raises:
        KronblocksError: the sparsifier is of another model.
    """
    there = [target for target in sparsifier.targets if target_now(sparsifier.model, target) is not None]  # not replaced
    targets = [target for target in there if type(target.module) is nn.Linear]
    places = {id(module): name for name, module in model.named_modules()}
    if not any(id(target.module) in places for target in targets):  # `model` is a copy, such as an average of weights
        places = {id(target.module): target.name for target in targets}
    modules = dict(copy.named_modules())
    for target in targets:
        place = places.get(id(target.module), "")
        linear = modules.get(place)
        if type(linear) is not nn.Linear or linear.weight.shape != target.module.weight.shape:
            raise KronblocksError(
                f"the sparsifier follows {target.name}, which is not a layer of this model: give the model that sparsify_ got, "
                "one that contains it, or a copy of it"
            )
        mask = target.mask.to(linear.weight.device)
        replace_(copy, place, BlockSparseLinear.from_dense(linear, block_size=target.grid.block, mask=mask))


def weight_targets(model: nn.Module, report: SurgeryReport) -> list[BlockTarget]:
    """The selected layers of an unchanged model, as masked nn.Linear targets."""
    return [_target(model, each) for each in report.selected]


@torch.no_grad()
def densify_(model: nn.Module) -> list[str]:
    """Replace every block layer by an nn.Linear (or convolution) of the same weight, in place. Returns their names."""
    layers = layers_of(model, BlockLayer)
    for name, old in layers.items():
        replace_(model, name, plain_linear(old))
    for name, around in layers_of(model, Unfolded).items():
        replace_(model, name, around.folded())
    return list(layers)
