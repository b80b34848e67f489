"""Read the layers to advise on: shapes, a model by import path, or a safetensors file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import safetensors
from torch import nn

from kronblocks.core.errors import KronblocksError
from kronblocks.core.imports import import_here

Layers = list[tuple[nn.Module, dict[str, int]]]
"""Models, and the number of equal layers for names that stand for several."""

_EXAMPLES = "shapes (out x in) such as 1024x1024 or 4096x1024*12, package.module:function, or file.safetensors"


def linears(layers: nn.Module | str | Sequence[str]) -> Layers:
    """The models whose nn.Linear layers are timed. Those of shapes and files are on the meta device.

    Raises:
        KronblocksError: something cannot be read, imported or found.
    """
    if isinstance(layers, nn.Module):
        return [(nn.ModuleDict({"model": layers}) if isinstance(layers, nn.Linear) else layers, {})]
    layers = [layers] if isinstance(layers, str) else layers
    if not isinstance(layers, Sequence) or not layers or not all(isinstance(each, str) for each in layers):
        raise KronblocksError(f"name layers by {_EXAMPLES}; {layers!r} is none of these")
    models: list[nn.Module] = []
    shapes: list[tuple[str, int, int, int]] = []  # name, out, in, count
    for each in layers:
        if found := re.fullmatch(r"(\d{1,9})x(\d{1,9})(?:\*(\d{1,6}))?", each):
            shapes.append((f"{found[1]}x{found[2]}", int(found[1]), int(found[2]), int(found[3] or 1)))
        elif each.endswith(".safetensors"):
            shapes += _in_file(Path(each).expanduser())
        elif re.fullmatch(r"[\w.]+:\w+", each):
            models.append(_call(each))
        else:
            raise KronblocksError(f"cannot read {each!r}: write {_EXAMPLES}")
    if wrong := [name for name, *numbers in shapes if 0 in numbers]:
        raise KronblocksError(f"{wrong[0]} is not a layer: sizes and counts are whole numbers from 1 on")
    together, counts = nn.Module(), dict.fromkeys((name for name, *_ in shapes), 0)
    for name, outputs, inputs, count in shapes:
        if not counts[name]:
            _put(together, name, nn.Linear(inputs, outputs, bias=False, device="meta"))
        counts[name] += count
    return [*([(together, counts)] if shapes else []), *((model, {}) for model in models)]


def _put(model: nn.Module, name: str, layer: nn.Linear) -> None:
    """Put a module into the model under a dotted name."""
    *path, last = name.split(".")
    for part in path:
        if part not in model._modules:
            model.add_module(part, nn.Module())
        model = model.get_submodule(part)
    for child, module in model.get_submodule(last).named_children() if last in model._modules else ():
        layer.add_module(child, module)
    model.add_module(last, layer)


def _in_file(path: Path) -> list[tuple[str, int, int, int]]:
    """The 2-D "*.weight" tensors of a safetensors file, without embeddings. Only its header is read."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118, no dictionary
    except (OSError, safetensors.SafetensorError) as error:
        raise KronblocksError(f"cannot read {path} as a safetensors file: {error}") from error
    names = [
        name
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2 and not re.search(r"emb|(^|\.)w[tp]e\.", name)
    ]
    if not names:
        raise KronblocksError(f"{path} has no 2-D tensor named *.weight: name shapes instead, such as 1024x1024")
    return [(name.removesuffix(".weight"), *shapes[name], 1) for name in names]


def _call(text: str) -> nn.Module:
    """Call "package.module:function", which returns a model. The working folder is searched, too."""
    module_name, _, function_name = text.partition(":")
    try:
        function = getattr(import_here(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise KronblocksError(f"cannot import {text!r}: {error}; write package.module:function, seen from here") from error
    if not callable(function):
        raise KronblocksError(f"{text!r} is {type(function).__name__} and cannot be called: name a function that returns a model")
    try:
        model = function()
    except TypeError as error:
        raise KronblocksError(f"{text!r} cannot be called ({error}): name a function without arguments") from error
    if not isinstance(model, nn.Module):
        raise KronblocksError(f"{text!r} returned {type(model).__name__}: name a function that returns an nn.Module")
    return model
