"""Save a model in a folder: live blocks as safetensors, and a card (kronblocks.json) that says how to build the layers.

The name of the weights' file depends on its content. The card names that file and is replaced last. So readers see the old model
or the new one, whenever the writer stops. Nothing that is read is ever executed.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from kronblocks.algorithms.training.sparsifier import Sparsifier
from kronblocks.config.sparsity import SparsityConfig
from kronblocks.core.errors import KronblocksError
from kronblocks.core.files import locked, read_json, replacing, write_json, write_text
from kronblocks.core.limits import MOST_LAYERS
from kronblocks.deploy.stored import WeightsReader, name_of, stored
from kronblocks.surgery.records import Recorded, first_tensor, rebuilt, structure, unfolded_names
from kronblocks.surgery.replace import bare, unfolding
from kronblocks.surgery.sparsify import pack_masked_

FORMAT = 2
_READ = (1, FORMAT)
CARD = "kronblocks.json"
_WEIGHTS = re.compile(r"model-[0-9a-f]{16}\.safetensors")


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    config: SparsityConfig | None = None,
    metadata: Mapping[str, str] | None = None,
    resized: Iterable[str] = (),
    sparsifier: Sparsifier | None = None,
) -> Path:
    """Write a model into a folder: kronblocks.json, the weights as safetensors, and the JSON files of a transformers model.

    Block layers are stored as live blocks only, and tied tensors once. A model in the folder is replaced at once; other files
    stay. If the model is compiled, or in DistributedDataParallel, the model inside is stored.

    The folder holds parameters and buffers with their dtypes, modules' extra state, and a transformers model's config and
    generation config. As in a state_dict, non-persistent buffers, `requires_grad` and the mode are left out.

    Args:
        model: with or without block layers.
        folder: made if it does not exist.
        config: the model's SparsityConfig, for people who read the card.
        metadata: texts of your own, such as the data and the accuracy.
        resized: names of linear layers with other sizes than in the model's code.
        sparsifier: for methods on plain nn.Linear, to store only live blocks of the layers that it masks.

    Returns:
        The folder.

    Raises:
        KronblocksError: the folder cannot be written to, or the disk is full (what was there before stays); tensors are on the
            meta device or sharded; or JSON and safetensors cannot hold some tensors or extra state.

    >>> import tempfile
    >>> from kronblocks import BlockSparseLinear
    >>> model = nn.Sequential(BlockSparseLinear(8, 6, 2, mask=torch.rand(3, 4) < 0.5))
    >>> folder = save_pretrained(model, Path(tempfile.mkdtemp()) / "small", metadata={"data": "none"})
    >>> again = from_pretrained(folder, nn.Sequential(nn.Linear(8, 6)))
    >>> torch.equal(again[0].weight, model[0].weight)
    True
    """
    folder, model = Path(folder), bare(model)
    if sparsifier is not None and sparsifier.masks_linears:
        original, model = model, copy.deepcopy(model)
        pack_masked_(model, original, sparsifier)
    found = stored(model)
    own = _own_files(model)
    card = {
        "format": FORMAT,
        "model": f"{type(model).__module__}.{type(model).__qualname__}",
        "structure": _compact_structure(model),
        "aliases": found.aliases,
        "extras": found.extras,
        "dtypes": found.dtypes,
        "resized": {name: _sizes(model.get_submodule(name)) for name in resized},
        "sparsity": None if config is None else config.to_dict(),
        "metadata": {str(name): str(value) for name, value in (metadata or {}).items()},
        "transformers": json.loads(own[_CONFIG]) if own else None,
        "generation": json.loads(own[_GENERATION]) if _GENERATION in own else None,
    }
    weights = name_of(found.tensors, found.tensors.__getitem__)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            with replacing(folder / weights) as temporary:
                safetensors.torch.save_file(found.tensors, temporary, {"format": "pt"})
            write_json(folder / CARD, {**card, "weights": weights})
            for name, text in own.items():  # for other tools: we read the card
                write_text(folder / name, text)
            for path in folder.glob("model-*.safetensors"):
                if _WEIGHTS.fullmatch(path.name) and path.name != weights:
                    path.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise KronblocksError(f"cannot save the model into {folder}: {error}. What was there before is unchanged") from error
    return folder


def from_pretrained(
    folder: str | Path, model: nn.Module | Callable[[], nn.Module] | None = None, *, verify: bool = True
) -> nn.Module:
    """Read a model that `save_pretrained` wrote, in eval mode.

    Args:
        folder: the model's folder.
        model: the same model, dense or sparse, or a function that makes it. Its block layers are built and its tensors loaded,
            with its own dtype and devices. None: build a transformers model from the folder, with the saved dtypes.
        verify: compare the weights with the SHA-256 in their file's name, which reads the file once more.

    Raises:
        KronblocksError: there is no such folder; it has another format or is damaged; or it does not fit the model, which then
            is unchanged.
    """
    folder, as_saved = Path(folder), model is None
    with _opened(folder) as (card, file):
        if verify and (found := name_of(file.keys(), file.get_tensor)) != card["weights"]:
            raise KronblocksError(
                f"{folder / card['weights']} is damaged: its weights have the hash of {found}. Copy or download the folder "
                "again, or save the model again; from_pretrained(..., verify=False) loads what is there"
            )
        if model is None:
            with torch.device("meta"):
                outline = _from_transformers(card, folder)
            _load(file, outline, card, folder, fill=False)  # a config may be hostile: check it before memory is allocated
            model = _from_transformers(card, folder)
        elif not isinstance(model, nn.Module):
            model = model() if callable(model) else model
            if not isinstance(model, nn.Module):
                raise KronblocksError(
                    f"from_pretrained needs a model, or a function that makes one, not {type(model).__name__}: "
                    "from_pretrained(folder, model)"
                )
        _load(file, model, card, folder, fill=True, as_saved=as_saved)
    return model.eval()


def _load(file: Any, model: nn.Module, card: dict[str, Any], folder: Path, *, fill: bool, as_saved: bool = False) -> None:
    """Check that a weights' file fits a model, and with `fill` load it."""
    on_meta = [name for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor) and tensor.is_meta]
    if fill and on_meta:
        raise KronblocksError(
            f"{on_meta[0]} of the model is on the meta device, where nothing can be loaded: call model.to_empty(device=...) first"
        )
    with unfolding(model, unfolded_names(card["structure"])):
        resized = _resized(model, card["resized"], folder)
        layers = {**resized, **rebuilt(model, card["structure"], "meta", resized)}
        reader = WeightsReader(file, model, layers, card, folder)
        reader.check()
        if fill:
            reader.fill_(as_saved=as_saved)


def read_card(folder: Path) -> dict[str, Any]:
    """Read kronblocks.json.

    Raises:
        KronblocksError: it is missing, damaged or has another format.
    """
    path = folder / CARD
    if not path.exists():
        raise KronblocksError(f"{folder} holds no {CARD}: name a folder that kronblocks.save_pretrained(model, folder) wrote")
    card = read_json(path)
    if not isinstance(card, dict) or card.get("format") not in _READ:
        found = card.get("format") if isinstance(card, dict) else None
        raise KronblocksError(f"{path} has format {found!r}, and this kronblocks reads formats {_READ[0]} to {FORMAT}")
    for name in ("resized", "extras", "dtypes"):  # folders of format 1 may lack them
        card.setdefault(name, {})
    kinds = {"weights": str} | dict.fromkeys(("structure", "aliases", "metadata", "resized", "extras", "dtypes"), dict)
    for name, kind in kinds.items():
        if not isinstance(card.get(name), kind):
            raise KronblocksError(f"{path} is damaged: {name} is not a {kind.__name__}")
    if not _WEIGHTS.fullmatch(card["weights"]):
        raise KronblocksError(f"{path} is damaged: {card['weights']!r} is no name of a weights' file")
    if not all(isinstance(name, str) for name in card["aliases"].values()):
        raise KronblocksError(f"{path} is damaged: aliases are no names of tensors")
    return card


def _sizes(layer: Any) -> list[int]:
    """The sizes of a linear layer, for `_resized`."""
    return [layer.out_features, layer.in_features, int(layer.bias is not None)]


def _resized(model: nn.Module, sizes: Mapping[str, Any], folder: Path) -> dict[str, nn.Linear]:
    """Make the linear layers with other sizes than the model's, on the meta device."""
    modules, layers = dict(model.named_modules()), {}
    for name, entry in sizes.items():
        old = modules.get(name)
        if not isinstance(old, nn.Linear | Recorded):
            raise KronblocksError(f"{folder} resizes a layer {name!r}, but the model has {type(old).__name__} there")
        match entry:
            case [int(rows), int(cols), int(bias)] if rows > 0 and cols > 0:
                dtype = first_tensor(old).dtype
                with contextlib.suppress(RuntimeError, OverflowError, TypeError):  # larger than torch counts
                    layers[name] = nn.Linear(cols, rows, bias=bool(bias), device="meta", dtype=dtype)
        if name not in layers:
            raise KronblocksError(f"{folder} is damaged: {entry!r} are no sizes of layer {name!r}")
    return layers


def _compact_structure(model: nn.Module) -> dict[str, Any]:
    """The structure record, with as many slots as there are live blocks."""
    record = structure(model)
    for name, entry in record["layers"].items():
        if "capacity" in entry:
            entry["capacity"] = int(model.get_submodule(name).get_buffer("block_mask").sum())
    return record


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[tuple[dict[str, Any], Any]]:
    """Open the card and the weights that it names; try again if a writer replaces them meanwhile."""
    card = read_card(folder)
    while True:
        path = folder / card["weights"]
        try:
            file = safe_open(path, framework="pt")
            break
        except (OSError, SafetensorError) as error:
            newer = read_card(folder)
            if newer["weights"] == card["weights"]:
                raise KronblocksError(f"cannot read {path}: {error}") from error
            card = newer
    try:
        with file:
            yield card, file
    except (OSError, SafetensorError) as error:
        raise KronblocksError(f"cannot read {path}: {error}") from error


def _own_files(model: nn.Module) -> dict[str, str]:
    """The JSON files of a transformers model, from which it can be built again; none for other models."""
    if not hasattr(getattr(model, "config", None), "to_json_string"):
        return {}
    own: Any = copy.deepcopy(model.config)
    own.architectures, own.dtype = [type(model).__name__], getattr(model, "dtype", None)
    files = {_CONFIG: own.to_json_string(use_diff=True)}
    generation: Any = getattr(model, "generation_config", None)
    return files if generation is None else {**files, _GENERATION: generation.to_json_string(use_diff=False)}


_CONFIG, _GENERATION = "config.json", "generation_config.json"


def _from_transformers(card: dict[str, Any], folder: Path) -> nn.Module:
    """A transformers model of the class and the sizes that the card names, not yet loaded."""
    if card.get("transformers") is None and not (folder / "config.json").exists():
        raise KronblocksError(
            f"{folder} holds no config.json of a transformers model, so it does not say how to build the model: write "
            "from_pretrained(folder, model), or give a function that makes it"
        )
    try:
        import transformers
    except ImportError as error:
        raise KronblocksError("the folder holds a transformers model: pip install transformers, or give the model") from error
    own = card.get("transformers") or read_json(folder / "config.json")  # older folders have it there only
    if not isinstance(own, dict) or not isinstance(own.get("architectures"), list):
        raise KronblocksError(f"{folder} names no class of transformers among its architectures: give the model")
    for name, value in own.items():
        if ("layer" in name or "depth" in name) and any(number > MOST_LAYERS for number in _whole_numbers(value)):
            raise KronblocksError(f"{folder} asks for {name}={value!r}, more than {MOST_LAYERS:,}")
    for name in own["architectures"]:
        kind = getattr(transformers, str(name), None)
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
            try:  # transformers' classes may raise anything
                config = transformers.AutoConfig.for_model(**own)
                model: Any = kind(config)
                if card["format"] == 1:  # it lacks the dtypes of buffers that are not stored
                    model = model.to(dtype=config.dtype or torch.get_default_dtype())
                if isinstance(generation := card.get("generation"), dict):
                    model.generation_config = transformers.GenerationConfig.from_dict(generation)
                return model
            except Exception as error:
                what = f"{type(error).__name__}: {error}"
                raise KronblocksError(f"{folder} says how to build {name}, but that fails: {what}") from error
    raise KronblocksError(f"{folder} names no class of transformers among its architectures: give the model")


def _whole_numbers(value: Any) -> Iterator[int]:
    """The whole numbers in a setting, also within lists."""
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, int):
            yield each
