"""Let plain models load block-sparse weights: the state_dict's tensors say which layers to build."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from kronblocks.algorithms.training import carried
from kronblocks.core.errors import KronblocksError
from kronblocks.nn.base import BlockLayer
from kronblocks.nn.unfolded import is_transposed
from kronblocks.surgery.reasons import is_convolution
from kronblocks.surgery.records import STRUCTURE_VERSION, apply_structure_

HINT = "call kronblocks.rebuild_on_load_(model) first"
"""An empty entry of trainers' checkpoints. Torch's error shows its name if a plain model loads one."""


def rebuild_on_load_(model: nn.Module) -> nn.Module:
    """Let a model load block-sparse weights: from now on `load_state_dict` first builds the block layers that they need.

    Use it for code that loads weights into a new model: Lightning's `load_from_checkpoint`, trainers without a callback,
    skorch's `load_params`, torch.hub. Weights of plain layers load as usual. To resume a training use
    `Sparsifier.load_state_dict` instead, which also knows the optimiser.

    Args:
        model: the model that will load, or a part of it; a LightningModule's `__init__` may pass self.

    Returns:
        The model.

    Raises:
        KronblocksError: at loading: the weights have other sizes, or the model has other block layers already.

    >>> import kronblocks
    >>> trained = nn.Sequential(kronblocks.BlockSparseLinear(8, 6, 2), nn.ReLU())
    >>> plain = rebuild_on_load_(nn.Sequential(nn.Linear(8, 6), nn.ReLU()))
    >>> plain.load_state_dict(trained.state_dict())
    <All keys matched successfully>
    >>> bool((plain[0].weight == trained[0].weight).all())
    True
    """
    if not isinstance(model, nn.Module):
        raise KronblocksError(f"rebuild_on_load_ needs a model, an nn.Module, not {type(model).__name__}")
    model.register_load_state_dict_pre_hook(_rebuild_)
    return model


def _rebuild_(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """The hook. It is a module-level function, so that models with it can be copied and pickled."""
    state_dict.pop(prefix + HINT, None)
    if carried.is_carried(model):  # its sparsifier restores layers and optimisers
        return
    state_dict.pop(prefix + carried.KEY, None)
    modules, found = dict(model.named_modules()), layers_of(state_dict, prefix)
    inside = {
        name: place for name in found if name not in modules and _is_folded(modules.get(place := name.removesuffix(".linear")))
    }
    layers = {name: entry for name, entry in found.items() if name in inside or _is_plain(modules.get(name), name, entry)}
    apply_structure_(model, {"version": STRUCTURE_VERSION, "layers": layers, "unfolded": list(inside.values())})


def layers_of(state_dict: Mapping[str, Any], prefix: str = "") -> dict[str, dict[str, Any]]:
    """The block layers of a state_dict, with kinds and sizes as in a structure record; plans are "auto".

    Args:
        state_dict: of a model, or of a module that contains it.
        prefix: of the model's names in it.
    """
    found = {}
    for key, mask in state_dict.items():
        name = key.removeprefix(prefix).removesuffix(".block_mask")
        if not key.startswith(prefix) or key == prefix + name or not isinstance(mask, Tensor) or mask.dim() != 2:
            continue
        part = {each: state_dict.get(f"{prefix}{name}.{each}") for each in ("values", "coeff", "tiles", "gate", "bias")}
        shared = {"bias": part["bias"] is not None, "plan": "auto"}
        rows, cols = mask.shape
        values, coeff, tiles = part["values"], part["coeff"], part["tiles"]
        if isinstance(values, Tensor) and values.dim() == 3:
            capacity, bm, bn = values.shape
            own = {"kind": "BlockSparseLinear", "capacity": capacity}
        elif isinstance(coeff, Tensor) and isinstance(tiles, Tensor) and tiles.dim() == 4:
            groups, rank, bm, bn = tiles.shape
            own = {"kind": "KroneckerBlockLinear", "rank": rank, "tile_groups": groups, "gate": part["gate"] is not None}
        else:
            continue
        sizes = {"in_features": cols * bn, "out_features": rows * bm, "block_size": f"{bm}x{bn}"}
        found[name] = {**own, **sizes, **shared}
    return found


def _is_folded(module: nn.Module | None) -> bool:
    """Whether a module is a convolution or Conv1D, in which a block layer may be."""
    return module is not None and (is_convolution(module) or is_transposed(module))


def _is_plain(old: nn.Module | None, name: str, entry: dict[str, Any]) -> bool:
    """Whether a plain layer is in the place of a block layer. False if nothing is there, or it was seen by another name."""
    if not isinstance(old, BlockLayer):
        return old is not None
    if {"kind": old.kind, **old.config(), "plan": "auto"} == entry:
        return False
    raise KronblocksError(
        f"the weights of {name} are of a {entry['kind']} with other sizes than the model's {old.kind}: load them "
        "into a new model, or call sparsifier.load_state_dict first if a sparsifier follows this one"
    )
