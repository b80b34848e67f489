"""The state of a sparsifier: save and load what belongs to its layers, and check a state before using it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kronblocks.algorithms.heads import parsed_heads
from kronblocks.algorithms.protocol import has_plans
from kronblocks.algorithms.targets import BlockTarget
from kronblocks.algorithms.training.layer_rates import parsed_rates
from kronblocks.algorithms.training.planning import parsed
from kronblocks.core.blocks import BlockSize
from kronblocks.core.errors import KronblocksError
from kronblocks.ops.plans import check_plan

STATE_VERSION = 2

_DICTS = ("rule_state", "structure", "plans", "planner", "masks")
_PARTS = frozenset({"version", "rule", "step", "total_steps", *_DICTS})


def layers_state(targets: Sequence[BlockTarget]) -> dict[str, dict[str, Any]]:
    """What the model's state_dict lacks: plans of block layers, masks of plain ones."""
    return {
        "plans": {t.name: getattr(t.layer, "active_plan", "dense") for t in targets if not t.is_plain},
        "masks": {t.name: t.mask.clone() for t in targets if t.is_plain},
    }


def load_layers_state_(targets: Sequence[BlockTarget], state: Mapping[str, Any]) -> None:
    """Restore what `layers_state` gave. The model loads its weights itself."""
    for target in targets:
        if target.is_plain:
            target.layer.set_block_mask_(state["masks"][target.name])
        elif has_plans(target.layer):
            target.layer.use_plan_(state["plans"][target.name])


def check_state(state: Any, *, rule: str, targets: Sequence[BlockTarget]) -> None:
    """Refuse what is no state of a sparsifier like this one.

    Raises:
        KronblocksError: the state is damaged, or of another version, algorithm or model.
    """
    version = state.get("version") if isinstance(state, dict) else None
    if version not in (None, STATE_VERSION):
        raise KronblocksError(f"the state has version {version}, and this kronblocks reads version {STATE_VERSION}")
    if not isinstance(state, dict) or not state.keys() >= _PARTS or not _is_whole(state):
        raise KronblocksError("this is no state of a Sparsifier: save sparsifier.state_dict() and load that")
    if state["rule"] != rule:
        raise KronblocksError(f"the state is of the rule {state['rule']}, but this sparsifier has {rule}: use the same")
    names, own = {*state["plans"], *state["masks"]}, [target.name for target in targets]
    if names != set(own):
        raise KronblocksError(
            f"the state targets {sorted(map(str, names))}, but this model's targets are {own}: "
            "use the same model and SparsityConfig"
        )
    for target in targets:
        _check_target(state, target)
    parsed(state["planner"])
    parsed_heads(state.get("heads"))
    parsed_rates(state.get("rates"))


def _check_target(state: dict[str, Any], target: BlockTarget) -> None:
    mask = state["masks"].get(target.name)
    if (mask is not None) != target.is_plain:
        forms = ("a block layer of its own", "a plain nn.Linear with a mask")
        raise KronblocksError(
            f"in the state {target.name!r} is {forms[mask is not None]}, but here it is {forms[target.is_plain]}: use the same "
            "method and storage"
        )
    if mask is not None and (mask.shape != target.grid.shape or mask.dtype != torch.bool):
        raise KronblocksError(
            f"in the state {target.name!r} has a mask of {tuple(mask.shape)}, but here blocks are {target.grid.shape}: use the "
            "same block size"
        )
    if not target.is_plain:
        _check_layer(state, target)


def _check_layer(state: dict[str, Any], target: BlockTarget) -> None:
    """Check that the state's layer in a target's place has the same blocks, and can compute by its plan."""
    layers, plan = state["structure"].get("layers"), state["plans"][target.name]
    entry = layers.get(target.name) if isinstance(layers, Mapping) else None
    if not isinstance(entry, Mapping):
        raise KronblocksError(f"the state's structure has no layer {target.name!r}: save sparsifier.state_dict() again")
    block = BlockSize.parse(entry.get("block_size", target.grid.block))
    if block != target.grid.block:
        raise KronblocksError(
            f"in the state {target.name!r} has blocks of {block}, but here they are {target.grid.block}: use the same block size"
        )
    if plan == "auto":  # layers never compute by it
        raise KronblocksError(f"the state's plan of {target.name!r} is 'auto', not a chosen one: save the state again")
    check_plan(plan, entry.get("rank"))


def _is_whole(state: dict[str, Any]) -> bool:
    """Whether a state has all its parts, with the right types."""
    steps = (state["step"], 0 if state["total_steps"] is None else state["total_steps"])
    return (
        all(isinstance(state[name], dict) for name in _DICTS)
        and all(isinstance(step, int) and not isinstance(step, bool) and step >= 0 for step in steps)
        and isinstance(first := state.get("initial_sparsity", 0.0), float)
        and 0 <= first < 1
        and all(isinstance(plan, str) for plan in state["plans"].values())
        and all(isinstance(mask, Tensor) for mask in state["masks"].values())
    )
