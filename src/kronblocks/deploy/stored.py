"""The weights' file of a saved model: live blocks, masks as bits, and one copy of tied tensors."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from kronblocks.algorithms.training import carried
from kronblocks.core.errors import KronblocksError
from kronblocks.core.shards import is_sharded
from kronblocks.deploy.extras import decoded, encoded, is_extra
from kronblocks.nn.block_sparse_linear import BlockSparseLinear
from kronblocks.nn.quantized_block_linear import QuantizedBlockLinear
from kronblocks.surgery.records import RECORDED, Recorded, first_tensor
from kronblocks.surgery.replace import replace_


class Stored(NamedTuple):
    """A model's state, as its folder holds it."""

    tensors: dict[str, Tensor]  # in the weights' file, by name
    aliases: dict[str, str]  # other names of tensors, to the name in the file
    extras: dict[str, Any]  # what is not a tensor, as JSON
    dtypes: dict[str, str]  # of buffers that are not stored


def stored(model: nn.Module) -> Stored:
    """Collect what is saved of a model.

    Raises:
        KronblocksError: tensors have no values or are sharded; or the file cannot hold some tensors or extra state.
    """
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_meta:
            raise KronblocksError(f"{name} is on the meta device and has no values to save")
        if is_sharded(tensor):
            raise KronblocksError(
                f"this process holds only a part of {name}: save a whole model, made on one process from "
                "torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True (docs/training.md)"
            )
    layers = {f"{prefix}.": layer for prefix, layer in model.named_modules() if isinstance(layer, RECORDED)}
    packed: dict[str, Tensor] = {prefix + name: value for prefix, layer in layers.items() for name, value in _pack(layer).items()}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    extras: dict[str, Any] = {}
    first: dict[Any, str] = {}

    def keep(name: str, tensor: Tensor) -> str:
        tensors[name] = _as_stored(name, tensor)
        return name

    state = model.state_dict()
    for name, value in state.items():
        if name.endswith(f".{_POSITION}") or name == carried.KEY:
            continue
        if is_extra(name, value):
            numbers = itertools.count()
            extras[name] = encoded(name, value, lambda each, name=name, numbers=numbers: keep(f"{name}.{next(numbers)}", each))
            continue
        _check_storable(name, value)
        where = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
        if value.numel() and first.setdefault(where, name) != name:
            aliases[name] = first[where]
        else:
            part = packed.get(name)
            keep(name, value if part is None else part)
    unsaved = {name: _word(each.dtype) for name, each in model.named_buffers() if name not in state and each.is_floating_point()}
    return Stored(tensors, aliases, extras, unsaved)


def _check_storable(name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided or is_traceable_wrapper_subclass(tensor) or tensor.is_quantized:
        raise KronblocksError(
            f"{name} is a {_word(tensor.layout)} {type(tensor).__name__}, which a safetensors file cannot hold: keep its parts, "
            "such as indices and values, as buffers, or register it with persistent=False"
        )
    if not _has_name(tensor.dtype):
        raise KronblocksError(f"{name} has dtype {tensor.dtype}, which a safetensors file cannot hold: use another one")


@functools.cache
def _has_name(dtype: torch.dtype) -> bool:
    """Whether safetensors has a name for a dtype. It has none for complex128 and integers of less than 8 bits."""
    try:
        safetensors.torch.save({"": torch.empty(0, dtype=dtype)})
    except KeyError:
        return False
    return True


def _as_stored(name: str, tensor: Tensor) -> Tensor:
    """A tensor as safetensors needs it: on the CPU, contiguous, in memory of its own."""
    _check_storable(name, tensor)
    value = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return value if value.untyped_storage().nbytes() == value.numel() * value.element_size() else value.clone()


def _word(setting: Any) -> str:
    return str(setting).removeprefix("torch.")


_POSITION = "block_position"


def _pack(layer: Recorded) -> dict[str, Tensor]:
    """The tensors of a block layer, for live blocks only, in row-major order, and the mask as bits."""
    mask = layer.block_mask
    if isinstance(layer, QuantizedBlockLinear):
        return {"block_mask": mask_as_bits(mask)}
    if isinstance(layer, BlockSparseLinear):
        position = layer.positions()
        order = position.argsort()
        parts = {"values": layer.values[order[mask.flatten()[position[order]]]]}
    else:
        parts = {name: value[mask] for name in ("coeff", "gate") if (value := getattr(layer, name)) is not None}
    return {**parts, "block_mask": mask_as_bits(mask)}


@torch.no_grad()
def _unpack_(layer: Recorded, read: Callable[[str], Tensor], mask: Tensor) -> None:
    """The reverse of `_pack`, into a layer whose sizes fit."""
    if isinstance(layer, QuantizedBlockLinear):
        for name in _own_tensors(layer):
            layer.get_buffer(name).copy_(read(name))
        layer.block_mask.copy_(mask)
        layer.refresh_index_()
        return
    if isinstance(layer, BlockSparseLinear):
        layer.block_position.copy_(mask.flatten().nonzero().squeeze(1))
    for name, parameter in layer.named_parameters(recurse=False):
        if name in ("coeff", "gate"):
            parameter.zero_()
            parameter[mask] = read(name).to(parameter)
        else:
            parameter.copy_(read(name))
    layer.block_mask.copy_(mask)
    layer.mask_changed_()
    layer.choose_plan_()


def _own_tensors(layer: Recorded) -> dict[str, Tensor]:
    """The tensors of a block layer that are stored beside its mask."""
    if not isinstance(layer, QuantizedBlockLinear):
        return dict(layer.named_parameters(recurse=False))
    return {name: tensor for name in ("values", "scales", "bias") if (tensor := getattr(layer, name)) is not None}


def mask_as_bits(mask: Tensor) -> Tensor:
    """A mask as uint8: eight blocks per byte in row-major order, the first in the lowest bit."""
    flat = mask.flatten().to(torch.uint8)
    padded = nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def mask_from_bits(bits: Tensor, shape: tuple[int, int]) -> Tensor:
    """The reverse of `mask_as_bits`."""
    flat = (bits.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1
    return flat.flatten()[: shape[0] * shape[1]].bool().view(shape)


def name_of(names: Iterable[str], read: Callable[[str], Tensor]) -> str:
    """A name for the weights' file that depends on its content only."""
    digest = hashlib.sha256()
    for name in sorted(names):
        tensor = read(name)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return f"model-{digest.hexdigest()[:16]}.safetensors"


class WeightsReader:
    """Loads a weights' file into a model: checks everything first, then fills.

    Args:
        file: the opened safetensors file.
        model: the model to fill.
        layers: layers, on the meta device, that will replace the model's own.
        card: the content of kronblocks.json.
        folder: for error messages.
    """

    def __init__(self, file: Any, model: nn.Module, layers: Mapping[str, Any], card: Mapping[str, Any], folder: Path) -> None:
        self._file, self._names, self._model, self._new = file, set(file.keys()), model, layers
        self._aliases, self._codes, self._dtypes, self._folder = card["aliases"], card["extras"], card["dtypes"], folder
        self._extras: dict[str, Any] = {}
        self._knows_extras = card["format"] > 1
        self._blocks: dict[str, Any] = {n: layers.get(n) or model.get_submodule(n) for n in card["structure"]["layers"]}
        self._masks: dict[str, Tensor] = {}
        self._plain = {name: layer for name, layer in layers.items() if name not in self._blocks}
        places = {id(model.get_submodule(name)) for name in (*self._blocks, *layers)}  # a layer may be in several places
        modules = model.named_modules(remove_duplicate=False)
        self._inside = tuple(f"{name}." for name, module in modules if id(module) in places)

    def _plain_tensors(self) -> list[tuple[str, Tensor]]:
        """The tensors of the future model that belong to none of the folder's block layers."""
        state = self._model.state_dict(keep_vars=True)
        others = [(name, t) for name, t in state.items() if not is_extra(name, t) and not name.startswith(self._inside)]
        return others + [(f"{prefix}.{name}", p) for prefix, layer in self._plain.items() for name, p in layer.named_parameters()]

    def check(self) -> None:
        """Raise unless the file holds exactly what the model needs, with its sizes."""
        wanted = {name: tuple(tensor.shape) for name, tensor in self._plain_tensors()}
        for prefix, layer in self._blocks.items():
            wanted |= self._sizes_of_blocks(prefix, layer)
        for name, shape in wanted.items():
            self._compare(name, shape)
        unknown = self._names - {self._stored_as(name) for name in wanted} - self._check_extras()
        if unknown:
            raise self._wrong(f"{min(unknown)} is in the file, but the model has no place for it")

    def _check_extras(self) -> set[str]:
        """Raise unless exactly the modules with extra state have one in the file; returns the names of its tensors."""
        wanted = {name for name, value in self._model.state_dict().items() if is_extra(name, value)}
        if self._knows_extras and wanted != self._codes.keys():
            name = min(wanted ^ self._codes.keys())
            where = "not in the file" if name in wanted else "in the file, but the model has no place for it"
            raise self._wrong(f"{name} is {where}")
        used: set[str] = set()

        def read(name: str) -> Tensor:
            used.add(name)
            return self._read(name)

        try:
            self._extras = {name: decoded(code, read) for name, code in self._codes.items()}
        except (KronblocksError, RecursionError) as error:
            raise KronblocksError(f"{self._folder} is damaged: {error}") from error
        old = {name for name in wanted & self._names if not self._knows_extras}  # format 1 held only tensors
        self._extras |= {name: self._read(name) for name in old}
        return used | old

    def _sizes_of_blocks(self, prefix: str, layer: Recorded) -> dict[str, tuple[int, ...]]:
        bits = f"{prefix}.block_mask"
        self._compare(bits, (-(-layer.grid.blocks // 8),))
        mask = mask_from_bits(self._read(bits), layer.grid.shape)
        self._masks[prefix], live = mask, int(mask.sum())
        if isinstance(layer, BlockSparseLinear | QuantizedBlockLinear) and layer.capacity != live:
            raise self._wrong(f"{prefix} has {live} live blocks, but the card says {layer.capacity}")
        sizes: dict[str, tuple[int, ...]] = {bits: (-(-layer.grid.blocks // 8),)}
        for name, parameter in _own_tensors(layer).items():
            per_block = {"values": 1, "coeff": 2, "gate": 2}.get(name)  # number of leading dimensions that index blocks
            shape = tuple(parameter.shape)
            sizes[f"{prefix}.{name}"] = shape if per_block is None else (live, *shape[per_block:])
        values = self._stored_as(f"{prefix}.values")
        if isinstance(layer, QuantizedBlockLinear) and values in self._names and self._file.get_slice(values).get_dtype() != "I8":
            raise self._wrong(f"{values} is not int8 in the file")
        return sizes

    def _stored_as(self, name: str) -> str:
        return name if name in self._names else self._aliases.get(name, name)

    def _compare(self, name: str, shape: tuple[int, ...]) -> None:
        stored = self._stored_as(name)
        if stored not in self._names:
            raise self._wrong(f"{name} is not in the file")
        found = tuple(self._file.get_slice(stored).get_shape())
        if found != shape:
            raise self._wrong(f"{name} is {found} in the file, and {shape} in the model")

    def _wrong(self, what: str) -> KronblocksError:
        return KronblocksError(f"{self._folder} does not fit the model: {what}. Give the same model, or save it again")

    def _read(self, name: str) -> Tensor:
        return self._file.get_tensor(self._stored_as(name))

    def fill_(self, *, as_saved: bool = False) -> None:
        """Put the block layers into their places and load everything.

        Args:
            as_saved: use the saved dtypes and ties; else those of the model.
        """
        for prefix, layer in self._new.items():
            old: Any = self._model.get_submodule(prefix)
            replace_(self._model, prefix, layer.to_empty(device=first_tensor(old).device))
        if as_saved:
            self._restore_types_()
        for prefix, layer in self._blocks.items():
            _unpack_(layer, lambda name, prefix=prefix: self._read(f"{prefix}.{name}"), self._masks[prefix])
        plain = {name: self._read(name) for name, _ in self._plain_tensors()}
        state = {name: value for name, value in self._model.state_dict().items() if name != carried.KEY}
        self._model.load_state_dict({**state, **plain, **self._extras})  # runs the modules' load hooks

    def _restore_types_(self) -> None:
        kept = [(name, p) for name, p in self._model.named_parameters() if self._stored_as(name) in self._names]
        for name, tensor in [*kept, *self._plain_tensors()]:
            dtype = self._read(name).dtype
            if tensor.dtype != dtype:
                tensor.data = tensor.data.to(dtype)
        for name, buffer in self._model.named_buffers():
            dtype = getattr(torch, str(self._dtypes.get(name)), buffer.dtype)
            if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype != buffer.dtype:
                buffer.data = buffer.data.to(dtype)
        for other, name in self._aliases.items():
            self._tie_(other, name)

    def _tie_(self, other: str, name: str) -> None:
        """Make two names of the model one parameter, as when it was saved."""
        (place, _, attribute), (home, _, own) = other.rpartition("."), name.rpartition(".")
        try:
            owner, parameter = self._model.get_submodule(place), self._model.get_submodule(home)._parameters[own]
        except (AttributeError, KeyError):  # a block layer's, or a buffer's
            return
        if owner._parameters.get(attribute) is not None:
            owner._parameters[attribute] = parameter
