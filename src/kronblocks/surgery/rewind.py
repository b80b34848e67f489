"""Rewinding: restore the weights of an earlier step but keep the masks, for lottery tickets and iterative pruning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kronblocks.algorithms.training.carried import KEY
from kronblocks.algorithms.training.places import check_none_replaced, stands_there, target_now
from kronblocks.algorithms.training.sparsifier import Sparsifier
from kronblocks.core.blocks import BlockGrid
from kronblocks.core.errors import KronblocksError
from kronblocks.core.tables import some
from kronblocks.nn.block_sparse_linear import BlockSparseLinear
from kronblocks.nn.kron_linear import KroneckerBlockLinear
from kronblocks.nn.unfolded import Transposed, Unfolded, UnfoldedConv
from kronblocks.ops.kron import kron_weight

_BLOCKS = frozenset({"weight", "values", "coeff", "tiles", "gate", "block_mask", "block_position"})


@torch.no_grad()
def rewind_(sparsifier: Sparsifier, state_dict: Mapping[str, Any]) -> None:
    """Restore the weights of an earlier step, but keep the present masks: dead blocks stay exactly zero.

    The whole model is restored, biases, norms and buffers included. Gradients and the state of attached optimisers are
    dropped; learning rates stay. If pruning is over (`phase` is "heal"), training goes on with the mask frozen. Else pruning
    goes on too.

    Args:
        sparsifier: of the model.
        state_dict: of the same model at an earlier step, before or after `sparsify_`. Copy its tensors, since they change in
            training. Layers of free values and plain layers accept dense weights, free values and factors. Layers of factors
            accept factors only. A block that lives now but was dead then starts at zero.

    Raises:
        KronblocksError: the state_dict is of another model, lacks a layer or has other ones, or has dense weights for factors;
            or the model is sharded. Nothing has changed then.

    Source:
        Frankle, Dziugaite, Roy, Carbin, "Linear mode connectivity and the lottery ticket hypothesis", 2020.

    >>> from kronblocks import SparsityConfig, sparsify_
    >>> model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
    >>> early = {name: value.clone() for name, value in model.state_dict().items()}
    >>> sparsifier = sparsify_(model, SparsityConfig(method="static", block_size=8, target_sparsity=0.5))
    >>> rewind_(sparsifier, early)
    >>> bool(((model[0].weight == early["0.weight"]) | (model[0].weight == 0)).all())
    True
    """
    model = sparsifier.model
    if not isinstance(state_dict, Mapping) or not all(isinstance(name, str) for name in state_dict):
        raise KronblocksError(f"rewind_ needs the model's state_dict of an earlier step, not {type(state_dict).__name__}")
    now = {target.name: target_now(model, target) for target in sparsifier.targets}
    check_none_replaced({t.name: stands_there(model, t) for t in sparsifier.targets if now[t.name] is None})
    if any(hasattr(parameter, "placements") for parameter in model.parameters()):
        raise KronblocksError("the model is sharded: rewind_ it before fully_shard")
    early = _Early(model, state_dict)
    new = dict(model.state_dict())
    new.pop(KEY, None)
    for target in now.values():
        assert target is not None
        new |= early.blocks(target.name, target.module, target.grid)
    early.rest_into(new)
    model.load_state_dict(new)
    for target in now.values():
        assert target is not None
        target.layer.enforce_zeros_()
    model.zero_grad(set_to_none=True)
    for optimizer in sparsifier._optimizers:
        optimizer.state.clear()


class _Early:
    """An earlier state, read layer by layer."""

    def __init__(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        self._model = model
        self._left = {name: value for name, value in state.items() if name != KEY}
        self._done: set[str] = set()  # names in the new state

    def blocks(self, name: str, layer: nn.Module, grid: BlockGrid) -> dict[str, Tensor]:
        """The tensors that hold the blocks of a layer, with the early values."""
        around = self._model.get_submodule(name.rpartition(".")[0])
        found = {part: self._left.pop(f"{name}.{part}") for part in _BLOCKS if f"{name}.{part}" in self._left}
        if not found and isinstance(around, Unfolded):
            found = self._folded(name.rpartition(".")[0], name, around)
        self._done |= {f"{name}.{part}" for part in _BLOCKS}
        if isinstance(layer, KroneckerBlockLinear):
            own = {part: value for part, value in layer.state_dict().items() if part in ("coeff", "tiles", "gate")}
            if any(part not in found or found[part].shape != value.shape for part, value in own.items()):
                raise KronblocksError(
                    f"{name} has factors now, but the state_dict has {', '.join(sorted(found)) or 'nothing'} for it: "
                    "give a state_dict that was made after sparsify_, with factors of the same sizes"
                )
            return {f"{name}.{part}": found[part] for part in own}
        weight = self._dense(name, found, grid).to(next(layer.parameters(recurse=False)).device)
        if isinstance(layer, BlockSparseLinear):
            blocks = grid.to_blocks(weight).flatten(0, 1)
            return {f"{name}.values": blocks[layer.block_position]}
        return {f"{name}.weight": weight}

    def rest_into(self, new: dict[str, Any]) -> None:
        """Put all other tensors into the new state.

        Raises:
            KronblocksError: the two states have different ones.
        """
        wanted = {name: value for name, value in new.items() if name not in self._done}
        missing, extra = sorted(wanted.keys() - self._left.keys()), sorted(self._left.keys() - wanted.keys())
        sizes = [
            name
            for name in wanted.keys() & self._left.keys()
            if isinstance(value := wanted[name], Tensor) and getattr(self._left[name], "shape", None) != value.shape
        ]
        for names, what in ((missing, "lacks"), (extra, "has in addition"), (sizes, "has with other sizes")):
            if names:
                raise KronblocksError(
                    f"the state_dict {what} {some(names)}: give model.state_dict() of the "
                    "model that sparsify_ got, from an earlier step"
                )
        new.update(self._left)

    def _folded(self, place: str, name: str, around: Unfolded) -> dict[str, Tensor]:
        """The early weight of a convolution or Conv1D, in the layout of the linear layer inside."""
        weight = self._left.pop(f"{place}.weight", None)
        if f"{place}.bias" in self._left:
            self._left[f"{name}.bias"] = self._left.pop(f"{place}.bias")
        if isinstance(weight, Tensor) and isinstance(around, Transposed):
            weight = weight.t()
        elif isinstance(weight, Tensor) and isinstance(around, UnfoldedConv):
            weight = around.rows_of(weight)
        return {} if weight is None else {"weight": weight}

    def _dense(self, name: str, found: Mapping[str, Tensor], grid: BlockGrid) -> Tensor:
        """The early weight (m, n) of a layer, from whatever tensors held it."""
        weight = None
        if "weight" in found:
            weight = found["weight"]
        elif found.keys() >= {"values", "block_mask", "block_position"} and found["block_mask"].shape == grid.shape:
            live = found["block_mask"].flatten()[found["block_position"]].view(-1, 1, 1)
            blocks = found["values"].new_zeros(grid.blocks, *found["values"].shape[1:])
            blocks = blocks.index_copy(0, found["block_position"], found["values"].masked_fill(~live, 0))
            weight = grid.from_blocks(blocks.unflatten(0, grid.shape)) if blocks.shape[1:] == (*grid.block,) else blocks
        elif found.keys() >= {"coeff", "tiles", "block_mask"} and found["block_mask"].shape == grid.shape:
            coeff = found["coeff"].masked_fill(~found["block_mask"].unsqueeze(-1), 0)
            weight = kron_weight(coeff * found["gate"].unsqueeze(-1) if "gate" in found else coeff, found["tiles"])
        if weight is None or tuple(weight.shape) != (grid.out_features, grid.in_features):
            what = "no weights" if weight is None else f"weights of {'x'.join(map(str, weight.shape))}"
            raise KronblocksError(
                f"the state_dict has {what} for {name}, which is {grid.out_features}x{grid.in_features} in blocks of "
                f"{grid.block}: give model.state_dict() of the model that sparsify_ got, from an earlier step"
            )
        return weight
