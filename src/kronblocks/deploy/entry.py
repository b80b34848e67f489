"""The entry `quantization_config` in config.json of a transformers model: which layers are block-sparse, as plain values.

The weights beside it are an ordinary state_dict, so all of transformers' ways of saving and loading work on them.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from kronblocks.core.blocks import BlockSize
from kronblocks.core.errors import KronblocksError
from kronblocks.core.limits import MOST_LABELS, MOST_LAYERS
from kronblocks.nn.base import BlockLayer
from kronblocks.nn.bsr_linear import BsrLinear
from kronblocks.surgery.records import RECORDED, Recorded, first_tensor, layers_of, rebuilt, structure, unfolded_names
from kronblocks.surgery.replace import replace_, unfolding

METHOD = "kronblocks"
VERSION = 1
RESIZED = "kronblocks_resized"
"""The attribute of an exported model that names its layers with other sizes than in the model's code."""

_COUNTS = ((re.compile("(layers?|depths?|experts)$"), MOST_LAYERS), (re.compile("labels$"), MOST_LABELS))
"""Settings that transformers builds one by one, by the ends of their names."""

_KINDS = {"layers": dict, "plans": dict, "unfolded": list, "resized": dict}


def is_sparse(model: nn.Module) -> bool:
    """Whether transformers' own folders of a model need the entry."""
    return any(isinstance(module, (*RECORDED, BsrLinear)) for module in model.modules())


def entry_of(model: nn.Module) -> dict[str, Any]:
    """The entry for a model as it is now.

    Raises:
        KronblocksError: a layer has torch's BSR layout, which safetensors files cannot hold.
    """
    if layers := layers_of(model, BsrLinear):
        raise KronblocksError(
            f"{min(layers)} is in torch's BSR form, which has no file format of its own: export with form='packed', save that, "
            "and call to_torch_bsr() on its layers after loading"
        )
    record = structure(model)
    resized = {name: sizes_of(model.get_submodule(name)) for name in getattr(model, RESIZED, ())}
    return {
        "quant_method": METHOD,
        "version": VERSION,
        "layers": record["layers"],
        "plans": {name: layer.active_plan for name, layer in layers_of(model, BlockLayer).items()},
        "unfolded": record.get("unfolded", []),
        "resized": resized,
    }


def checked(entry: Any) -> dict[str, Any]:
    """An entry that was read, with nothing else in it.

    Raises:
        KronblocksError: it has another version, or its parts are of other types.
    """
    if not isinstance(entry, Mapping) or entry.get("quant_method") != METHOD:
        raise KronblocksError(f"config.json is damaged: its quantization_config is none of {METHOD}")
    if entry.get("version") != VERSION or isinstance(entry["version"], bool):
        raise KronblocksError(
            f"quantization_config in config.json has version {str(entry.get('version'))[:40]!r}, and this kronblocks reads "
            f"version {VERSION}: install a newer kronblocks"
        )
    for name, kind in _KINDS.items():
        if not isinstance(entry.get(name), kind):
            raise KronblocksError(f"config.json is damaged: {name} in its quantization_config is not a {kind.__name__}")
    unfolded_names(entry)
    return {name: entry[name] for name in ("quant_method", "version", *_KINDS)}


def check_sizes(config: Any, where: object) -> None:
    """Refuse a config of transformers whose layers or labels would fill the memory one by one.

    Raises:
        KronblocksError: it asks for too many.
    """
    for key, number in _whole_numbers(config):
        most = next((most for pattern, most in _COUNTS if pattern.search(key)), number)
        if number > most:
            raise KronblocksError(f"{where} asks for {key}={number!r}, more than {most:,}")


def _whole_numbers(config: Any, under: str = "") -> Iterator[tuple[str, int]]:
    """The whole numbers of a config with their keys, also those in lists and in parts."""
    waiting = [(under, config)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, Mapping) and key != "label2id":
            waiting += [(str(inner), each) for inner, each in value.items()]
        elif isinstance(value, list):
            waiting += [(key, each) for each in value]
        elif isinstance(value, int):
            yield key, value


def fitted(entry: Mapping[str, Any], model: nn.Module, *, whole: bool) -> dict[str, Any]:
    """The entry with the names of a model, which may be the saved one, its base, or one with another head.

    Args:
        entry: what `checked` gave.
        model: of transformers, or any other with the same names.
        whole: raise for layers that the model lacks, rather than leave them out.

    Raises:
        KronblocksError: it lacks some with `whole`, or has none of them.
    """
    names = {name for name, _ in model.named_modules(remove_duplicate=False)}
    inner = f"{getattr(model, 'base_model_prefix', '') or ''}."

    def here(name: str) -> str | None:
        for each in (name, name.removeprefix(inner), inner + name):
            if each in names or (each.endswith(".linear") and each.removesuffix(".linear") in names):
                return each
        return None

    places = {name: here(name) for name in (*entry["layers"], *entry["unfolded"], *entry["resized"])}
    missing = [name for name, place in places.items() if place is None]
    if missing and (whole or len(missing) == len(places)):
        raise KronblocksError(f"config.json has a layer {missing[0]!r}, which the model lacks: use the class that was saved")
    return {
        **entry,
        "layers": {place: each for name, each in entry["layers"].items() if (place := places[name])},
        "plans": {place: each for name, each in entry["plans"].items() if (place := here(name))},
        "unfolded": [place for name in entry["unfolded"] if (place := places[name])],
        "resized": {place: each for name, each in entry["resized"].items() if (place := places[name])},
    }


@contextlib.contextmanager
def outlined(entry: Mapping[str, Any], model: nn.Module, room: int) -> Iterator[dict[str, nn.Module]]:
    """The layers of an entry that a model lacks, on the meta device. The model's convolutions are unfolded; exceptions fold them.

    Args:
        entry: what `fitted` gave.
        model: the one that they are for.
        room: bytes of the weights' files, which hold at least one byte for each block.

    Raises:
        KronblocksError: they do not fit the model, or the files.
    """
    blocks = sum(_blocks(each) for each in entry["layers"].values())
    if blocks > room:
        raise KronblocksError(f"config.json asks for {blocks:,} blocks, more than the files of weights can hold")
    with unfolding(model, entry["unfolded"]):
        resized = resized_layers(model, entry["resized"], "config.json")
        record = {"version": VERSION, "layers": entry["layers"]}
        yield {**resized, **rebuilt(model, record, "meta", resized)}


def _blocks(layer: Any) -> int:
    """How many blocks a layer of an entry has; 0 if it is damaged, which the layer's own checks say."""
    match layer:
        case {"in_features": int(cols), "out_features": int(rows), "block_size": block} if cols > 0 and rows > 0:
            return rows * cols // BlockSize.parse(block).area
    return 0


def build_(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Put layers into their places."""
    for name, layer in layers.items():
        replace_(model, name, layer)


def finish_(model: nn.Module, entry: Mapping[str, Any]) -> None:
    """Make the layers of a model ready, after their tensors have been loaded.

    Args:
        model: with the layers of the entry.
        entry: what `fitted` gave. With the plans in it the outputs are those of the saved model, to the bit.

    Raises:
        KronblocksError: the tensors of a layer contradict each other, or its plan cannot compute it.
    """
    for name, layer in layers_of(model, RECORDED).items():
        if isinstance(layer, BlockLayer):
            layer.mask_changed_()
            plan = entry["plans"].get(name)
            layer.choose_plan_()
            if plan is not None and layer.plan == "auto":
                layer.use_plan_(plan)
        else:
            layer.refresh_index_()


def sizes_of(layer: Any) -> list[int]:
    """The sizes of a linear layer, for `resized_layers`."""
    return [layer.out_features, layer.in_features, int(layer.bias is not None)]


def resized_layers(model: nn.Module, sizes: Mapping[str, Any], where: object) -> dict[str, nn.Linear]:
    """Make the linear layers with other sizes than the model's, on the meta device.

    Raises:
        KronblocksError: the model has no linear layer there, or a size is none.
    """
    modules, layers = dict(model.named_modules()), {}
    for name, entry in sizes.items():
        old = modules.get(name)
        if not isinstance(old, nn.Linear | Recorded):
            raise KronblocksError(f"{where} resizes a layer {name!r}, but the model has {type(old).__name__} there")
        match entry:
            case [int(rows), int(cols), int(bias)] if rows > 0 and cols > 0:
                dtype = first_tensor(old).dtype
                with contextlib.suppress(RuntimeError, OverflowError, TypeError):  # larger than torch counts
                    layers[name] = nn.Linear(cols, rows, bias=bool(bias), device="meta", dtype=dtype)
        if name not in layers:
            raise KronblocksError(f"{where} is damaged: {entry!r} are no sizes of layer {name!r}")
    return layers


def tied_to_blocks(tied: Iterable[str], layers: Iterable[str]) -> str | None:
    """A tied weight that is one of these layers', which cannot be: block layers have no such parameter."""
    inside = {f"{name}.weight" for name in layers}
    return min((name for name in tied if name in inside), default=None)
