"""The structure record: kinds and sizes of a model's block layers as plain values, to rebuild them before loading weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kronblocks.core.errors import KronblocksError
from kronblocks.core.limits import MOST_FACTORS
from kronblocks.nn.base import BlockLayer
from kronblocks.nn.block_sparse_linear import BlockSparseLinear
from kronblocks.nn.kron_linear import KroneckerBlockLinear
from kronblocks.nn.quantized_block_linear import QuantizedBlockLinear
from kronblocks.nn.unfolded import Unfolded
from kronblocks.surgery.replace import replace_, unfolding
from kronblocks.surgery.start import is_trained

STRUCTURE_VERSION = 1
KINDS: dict[str, Any] = {kind.__name__: kind for kind in (KroneckerBlockLinear, BlockSparseLinear, QuantizedBlockLinear)}
RECORDED = (BlockLayer, QuantizedBlockLinear)
"""The classes of the layers that a record lists."""

Recorded = BlockLayer | QuantizedBlockLinear


def layers_of(model: nn.Module, kind: type[nn.Module] | tuple[type[nn.Module], ...]) -> dict[str, Any]:
    """The modules of a class, or of several, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def structure(model: nn.Module) -> dict[str, Any]:
    """The kind and sizes of every block layer as plain values, for `apply_structure_`."""
    layers, around = layers_of(model, RECORDED), layers_of(model, Unfolded)
    record = {
        "version": STRUCTURE_VERSION,
        "layers": {name: {"kind": layer.kind, **layer.config()} for name, layer in layers.items()},
    }
    return {**record, "unfolded": list(around)} if around else record


def apply_structure_(model: nn.Module, record: Mapping[str, Any]) -> None:
    """Give a model the block layers of a record, in place. Load the state_dict, which has the masks, afterwards.

    Layers that have the recorded structure already stay.

    Raises:
        KronblocksError: the record has another version or does not fit the model. Nothing has changed then.
    """
    with unfolding(model, unfolded_names(record)):
        for name, layer in rebuilt(model, record).items():
            replace_(model, name, layer)


def unfolded_names(record: Any) -> list[str]:
    """Names of a record's layers that are inside convolutions.

    Raises:
        KronblocksError: it is no structure record.
    """
    names = record.get("unfolded", []) if isinstance(record, Mapping) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise KronblocksError("this is no structure record: make one with kronblocks.surgery.structure(model)")
    return names


def rebuilt(
    model: nn.Module,
    record: Mapping[str, Any],
    device: torch.device | str | None = None,
    instead: Mapping[str, nn.Linear] | None = None,
) -> dict[str, Recorded]:
    """Build the layers of a record that the model lacks, by name. They are not put into the model.

    Args:
        model: the model that they are for.
        record: what `structure` gave.
        device: of the new layers; None: that of the model's layers.
        instead: layers, by name, that will replace the model's own.

    Raises:
        KronblocksError: the record has another version or does not fit the model.
    """
    if not isinstance(record, Mapping) or not isinstance(record.get("layers"), Mapping):
        raise KronblocksError("this is no structure record: make one with kronblocks.surgery.structure(model)")
    if record.get("version") != STRUCTURE_VERSION:
        raise KronblocksError(
            f"the structure record has version {record.get('version')!r}, and this kronblocks reads version {STRUCTURE_VERSION}"
        )
    modules = {**dict(model.named_modules()), **(instead or {})}
    gpus = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(gpus)):  # keep the user's random numbers: weights will be loaded
        new = {name: _rebuild(modules.get(name), name, entry, device) for name, entry in record["layers"].items()}
    return {name: layer for name, layer in new.items() if layer is not None}


def _rebuild(old: nn.Module | None, name: str, entry: Any, device: torch.device | str | None) -> Recorded | None:
    """The layer of a record's entry; None if the model has it already."""
    if not isinstance(old, nn.Linear | Recorded):
        raise KronblocksError(
            f"the record has a layer {name!r}, but the model has {type(old).__name__} there: use the same model"
        )
    if not isinstance(entry, Mapping) or not isinstance(entry.get("kind"), str) or entry["kind"] not in KINDS:
        raise KronblocksError(f"the record's layer {name!r} is of an unknown kind: there are {', '.join(KINDS)}")
    settings = dict(entry)
    kind: type[Recorded] = KINDS[settings.pop("kind")]
    if isinstance(old, kind) and old.config() == settings:
        return None
    if (settings.get("in_features"), settings.get("out_features")) != (old.in_features, old.out_features):
        raise KronblocksError(f"the record's layer {name!r} has other sizes than the model's: use the same model")
    if flags := [flag for flag in ("gate", "bias") if not isinstance(settings.get(flag, True), bool)]:
        raise KronblocksError(f"the record's layer {name!r} has {flags[0]}={settings[flags[0]]!r}, not True or False")
    weight = first_tensor(old)
    try:
        where: Any = {"device": weight.device if device is None else device}
        if issubclass(kind, BlockLayer):
            where["dtype"] = weight.dtype
        outline = kind(**settings, **{**where, "device": "meta"})
        most = MOST_FACTORS * (old.in_features + 1) * (old.out_features + 1)
        if str(where["device"]) != "meta" and sum(t.numel() for t in outline.parameters()) > most:
            raise ValueError(f"rank {settings.get('rank')} in a layer of {old.out_features}x{old.in_features}")
        layer = kind(**settings, **where)
    except KronblocksError:
        raise
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise KronblocksError(f"the record's layer {name!r} has settings that {kind.__name__} does not know: {error}") from error
    if isinstance(layer, BlockLayer) and not isinstance(old, QuantizedBlockLinear):
        if old.bias is not None and layer.bias is not None:
            layer.bias = old.bias
        for p in layer.block_parameters():
            p.requires_grad_(is_trained(old))
    return layer.train(old.training)


def first_tensor(layer: nn.Linear | Recorded) -> Tensor:
    """A tensor with the layer's device and dtype of computing."""
    return layer.scales if isinstance(layer, QuantizedBlockLinear) else next(layer.parameters(recurse=False))
