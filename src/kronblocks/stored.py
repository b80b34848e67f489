"""What a weights' file of a saved model holds: of block layers the live blocks and the mask as bits, of tied tensors one copy."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kronblocks.errors import KronblocksError
from kronblocks.modules import replace_
from kronblocks.nn.base import BlockLayer
from kronblocks.nn.block_sparse_linear import BlockSparseLinear
from kronblocks.shards import is_sharded
from kronblocks.sparsity import carried


def stored(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of the file by name, and for other names of the same tensor the one that it is stored under."""
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_meta:
            raise KronblocksError(f"{name} is on the meta device and has no values to save")
        if is_sharded(tensor):
            raise KronblocksError(
                f"of {name} this process holds a part: save a whole model, made on one process from "
                "torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True (docs/training.md)"
            )
    layers = {f"{prefix}.": layer for prefix, layer in model.named_modules() if isinstance(layer, BlockLayer)}
    packed = {prefix + name: value for prefix, layer in layers.items() for name, value in _pack(layer).items()}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor) or name.endswith(f".{_POSITION}") or name == carried.KEY:
            continue
        where = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and first.setdefault(where, name) != name:
            aliases[name] = first[where]
        else:
            value = packed.get(name, tensor).cpu().contiguous()
            whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
            tensors[name] = value if whole else value.clone()  # safetensors refuses to store parts of one piece of memory
    return tensors, aliases


_POSITION = "block_position"


def _pack(layer: BlockLayer) -> dict[str, Tensor]:
    """What holds something for each block, of live blocks only, in row-major order; the mask as bits."""
    mask = layer.block_mask
    if isinstance(layer, BlockSparseLinear):
        order = layer.block_position.argsort()
        parts = {"values": layer.values[order[mask.flatten()[layer.block_position[order]]]]}
    else:
        parts = {name: value[mask] for name in ("coeff", "gate") if (value := getattr(layer, name)) is not None}
    return {**parts, "block_mask": mask_as_bits(mask)}


@torch.no_grad()
def _unpack_(layer: BlockLayer, read: Callable[[str], Tensor], mask: Tensor) -> None:
    """The reverse, into a layer whose sizes fit."""
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


def mask_as_bits(mask: Tensor) -> Tensor:
    """A mask as uint8, eight blocks each, in row-major order, the first one lowest."""
    flat = mask.flatten().to(torch.uint8)
    padded = nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def mask_from_bits(bits: Tensor, shape: tuple[int, int]) -> Tensor:
    """The reverse of `mask_as_bits`."""
    flat = (bits.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1
    return flat.flatten()[: shape[0] * shape[1]].bool().view(shape)


def name_of(tensors: dict[str, Tensor]) -> str:
    """A name for the weights' file that depends on nothing but what it holds."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return f"model-{digest.hexdigest()[:16]}.safetensors"


class WeightsReader:
    """A weights' file beside the model that it is to be loaded into: checks everything first, then fills.

    Args:
        file: opened safetensors.
        model: what is loaded into.
        layers: those that will take the places of the model's own, on the meta device.
        card: what the folder says.
        folder: for error messages.
    """

    def __init__(self, file: Any, model: nn.Module, layers: Mapping[str, Any], card: Mapping[str, Any], folder: Path) -> None:
        self._file, self._names, self._model, self._new = file, set(file.keys()), model, layers
        self._aliases, self._folder = card["aliases"], folder
        self._blocks: dict[str, Any] = {n: layers.get(n) or model.get_submodule(n) for n in card["structure"]["layers"]}
        self._masks: dict[str, Tensor] = {}
        self._plain = {name: layer for name, layer in layers.items() if name not in self._blocks}
        places = {id(model.get_submodule(name)) for name in (*self._blocks, *layers)}  # a layer may stand in several
        modules = model.named_modules(remove_duplicate=False)
        self._inside = tuple(f"{name}." for name, module in modules if id(module) in places)

    def _plain_tensors(self) -> list[tuple[str, Tensor]]:
        """What of the model's state, as it will be, belongs to no block layer of the folder."""
        state = self._model.state_dict(keep_vars=True)
        others = [(name, t) for name, t in state.items() if isinstance(t, Tensor) and not name.startswith(self._inside)]
        return others + [(f"{prefix}.{name}", p) for prefix, layer in self._plain.items() for name, p in layer.named_parameters()]

    def check(self) -> None:
        """Raise unless the file holds just what the model needs, in its sizes."""
        wanted = {name: tuple(tensor.shape) for name, tensor in self._plain_tensors()}
        for prefix, layer in self._blocks.items():
            wanted |= self._sizes_of_blocks(prefix, layer)
        for name, shape in wanted.items():
            self._compare(name, shape)
        unknown = self._names - {self._stored_as(name) for name in wanted}
        if unknown:
            raise self._wrong(f"{min(unknown)} is in the file, and the model has no place for it")

    def _sizes_of_blocks(self, prefix: str, layer: BlockLayer) -> dict[str, tuple[int, ...]]:
        bits = f"{prefix}.block_mask"
        self._compare(bits, (-(-layer.grid.blocks // 8),))
        mask = mask_from_bits(self._read(bits), layer.grid.shape)
        self._masks[prefix], live = mask, int(mask.sum())
        if isinstance(layer, BlockSparseLinear) and layer.capacity != live:
            raise self._wrong(f"{prefix} has {live} live blocks, and the card says {layer.capacity}")
        sizes: dict[str, tuple[int, ...]] = {bits: (-(-layer.grid.blocks // 8),)}
        for name, parameter in layer.named_parameters(recurse=False):
            per_block = {"values": 1, "coeff": 2, "gate": 2}.get(name)  # leading dimensions that number blocks
            shape = tuple(parameter.shape)
            sizes[f"{prefix}.{name}"] = shape if per_block is None else (live, *shape[per_block:])
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

    def fill_(self) -> None:
        """Put the block layers into their places and load everything."""
        for prefix, layer in self._new.items():
            old = self._model.get_submodule(prefix)
            replace_(self._model, prefix, layer.to_empty(device=next(old.parameters(recurse=False)).device))
        for prefix, layer in self._blocks.items():
            _unpack_(layer, lambda name, prefix=prefix: self._read(f"{prefix}.{name}"), self._masks[prefix])
        with torch.no_grad():
            for name, tensor in self._plain_tensors():
                tensor.copy_(self._read(name))
