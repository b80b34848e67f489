"""Folders that transformers' own save_pretrained wrote, and the JSON files of its models."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kronblocks.core.errors import KronblocksError
from kronblocks.core.files import read_json
from kronblocks.deploy import entry as entries
from kronblocks.surgery.records import first_tensor
from kronblocks.surgery.replace import replace_

CONFIG, GENERATION = "config.json", "generation_config.json"

OTHER_FORMAT = "write kronblocks.from_pretrained(folder), which reads this folder (pip install kronblocks)"
"""In the config.json of our own format, in the place of a name of a file: transformers refuses the name and prints it."""


def own_files(model: nn.Module) -> dict[str, str]:
    """The JSON files of a transformers model, from which it can be built again; none for other models."""
    if not hasattr(getattr(model, "config", None), "to_json_string"):
        return {}
    own: Any = copy.deepcopy(model.config)
    own.architectures, own.dtype = [type(model).__name__], getattr(model, "dtype", None)
    files = {CONFIG: own.to_json_string(use_diff=True)}
    generation: Any = getattr(model, "generation_config", None)
    return files if generation is None else {**files, GENERATION: generation.to_json_string(use_diff=False)}


def class_of(own: Any, folder: Path) -> Any:
    """transformers' class that a config names.

    Raises:
        KronblocksError: it names none, asks for too much, or transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise KronblocksError("the folder holds a transformers model: pip install transformers, or give the model") from error
    if isinstance(own, dict) and isinstance(own.get("architectures"), list):
        entries.check_sizes({key: value for key, value in own.items() if key != "quantization_config"}, folder)
        for name in own["architectures"]:
            kind = getattr(transformers, name, None) if isinstance(name, str) else None
            if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
                return kind
    raise KronblocksError(f"{folder} names no class of transformers among its architectures: give the model")


def built(own: Any, generation: Any, folder: Path, *, cast: bool) -> nn.Module:
    """A transformers model of the class and the sizes of a config, not yet loaded. `cast`: give it the config's dtype."""
    kind = class_of(own, folder)
    import transformers

    with _one_sentence(kind, folder):
        config = transformers.AutoConfig.for_model(**own)
        model: Any = kind(config)
        model = model.to(dtype=config.dtype or torch.get_default_dtype()) if cast else model
        if isinstance(generation, dict):
            model.generation_config = transformers.GenerationConfig.from_dict(generation)
        return model


@contextlib.contextmanager
def _one_sentence(kind: Any, folder: Path) -> Iterator[None]:
    """Say what transformers' classes raise, which may be anything, as one error."""
    try:
        yield
    except KronblocksError:
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise KronblocksError(f"{folder} says how to build {kind.__name__}, but that fails: {what}") from error


def is_own(folder: Path) -> bool:
    """Whether transformers' own save_pretrained wrote a block-sparse model there."""
    if not (folder / CONFIG).is_file():
        return False
    entry = own.get("quantization_config") if isinstance(own := read_json(folder / CONFIG), dict) else None
    return isinstance(entry, dict) and entry.get("quant_method") == entries.METHOD


def read_own(folder: Path, model: nn.Module | None) -> nn.Module:
    """Read such a folder, into a model if it is given.

    Raises:
        KronblocksError: it is damaged, or does not fit the model, which then is unchanged.
    """
    own = read_json(folder / CONFIG)
    entries.checked(own["quantization_config"])
    if model is not None:
        check_places(model)
    kind = class_of(own, folder)
    with _one_sentence(kind, folder):  # also for a given model, since files may have other names than the model's
        found = kind.from_pretrained(str(folder), dtype="auto", local_files_only=True)
    if model is None:
        return found
    _fill_(model, found, folder)
    return model


def check_places(model: nn.Module) -> None:
    """Raise if a model is on the meta device, where nothing can be loaded."""
    on_meta = [name for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor) and tensor.is_meta]
    if on_meta:
        raise KronblocksError(
            f"{on_meta[0]} of the model is on the meta device, where nothing can be loaded: call model.to_empty(device=...) first"
        )


def _fill_(model: nn.Module, found: nn.Module, folder: Path) -> None:
    """Give a model the block layers and the tensors of another one."""
    entry = entries.fitted(entries.entry_of(found), model, whole=True)
    state = found.state_dict()
    room = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    with entries.outlined(entry, model, room) as layers:
        _check(state, _future_state(model, layers), folder)
        for name, layer in layers.items():
            old: Any = model.get_submodule(name)
            replace_(model, name, layer.to_empty(device=first_tensor(old).device))
    model.load_state_dict(state)
    entries.finish_(model, entry)


def _future_state(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, Any]:
    """What the state_dict of a model will hold once it has these layers, by name; values have the sizes."""
    modules = dict(model.named_modules(remove_duplicate=False))
    places = {id(modules[name]): layer for name, layer in layers.items()}
    inside = {name: layer for name, module in modules.items() if (layer := places.get(id(module))) is not None}
    state = {key: value for key, value in model.state_dict().items() if not key.startswith(tuple(f"{name}." for name in inside))}
    return state | {f"{name}.{key}": value for name, layer in inside.items() for key, value in layer.state_dict().items()}


def _check(found: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Raise unless a state_dict has what another one needs, with its sizes."""
    for name in sorted(found.keys() ^ wanted.keys()):
        where = "not in its files" if name in wanted else "in its files, but the model has no place for it"
        raise KronblocksError(f"{folder} does not fit the model: {name} is {where}")
    for name, value in wanted.items():
        sizes = tuple(getattr(found[name], "shape", ())), tuple(getattr(value, "shape", ()))
        if sizes[0] != sizes[1]:
            raise KronblocksError(f"{folder} does not fit the model: {name} is {sizes[0]} in its files, and {sizes[1]} there")
