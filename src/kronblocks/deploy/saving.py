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
from torch import nn

from kronblocks.algorithms.training.sparsifier import Sparsifier
from kronblocks.config.sparsity import SparsityConfig
from kronblocks.core.errors import KronblocksError
from kronblocks.core.files import locked, read_json, replacing, write_json, write_text
from kronblocks.deploy.cards import write_card
from kronblocks.deploy.entry import RESIZED, resized_layers, sizes_of
from kronblocks.deploy.hub import downloaded, looks_remote
from kronblocks.deploy.stored import WeightsReader, name_of, stored
from kronblocks.deploy.transformers_folders import (
    CONFIG,
    GENERATION,
    OTHER_FORMAT,
    built,
    check_places,
    is_own,
    own_files,
    read_own,
)
from kronblocks.surgery.records import rebuilt, structure, unfolded_names
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
    """Write a model into a folder: kronblocks.json, the weights as safetensors, README.md, and a transformers model's JSON files.

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
    own = own_files(model)
    card = {
        "format": FORMAT,
        "model": f"{type(model).__module__}.{type(model).__qualname__}",
        "structure": _compact_structure(model),
        "aliases": found.aliases,
        "extras": found.extras,
        "dtypes": found.dtypes,
        "resized": {name: sizes_of(model.get_submodule(name)) for name in {*resized, *getattr(model, RESIZED, ())}},
        "sparsity": None if config is None else config.to_dict(),
        "metadata": {str(name): str(value) for name, value in (metadata or {}).items()},
        "transformers": json.loads(own[CONFIG]) if own else None,
        "generation": json.loads(own[GENERATION]) if GENERATION in own else None,
    }
    weights = name_of(found.tensors, found.tensors.__getitem__)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            with replacing(folder / weights) as temporary:
                safetensors.torch.save_file(found.tensors, temporary, {"format": "pt"})
            write_json(folder / CARD, {**card, "weights": weights})
            for name, text in own.items():  # for other tools: we read the card
                write_text(folder / name, text if name != CONFIG else _guarded(text))
            write_card(folder, model, card["metadata"])
            for path in folder.glob("model-*.safetensors"):
                if _WEIGHTS.fullmatch(path.name) and path.name != weights:
                    path.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise KronblocksError(f"cannot save the model into {folder}: {error}. What was there before is unchanged") from error
    return folder


def from_pretrained(
    folder: str | Path,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    *,
    verify: bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
) -> nn.Module:
    """Read a model that `save_pretrained` wrote, or transformers' own `model.save_pretrained`, in eval mode.

    Args:
        folder: the model's folder; or "user/name" of a repository on the Hugging Face Hub, if no such folder exists.
        model: the same model, dense or sparse, or a function that makes it. Its block layers are built and its tensors loaded,
            with its own dtype and devices. None: build a transformers model from the folder, with the saved dtypes.
        verify: compare the weights with the SHA-256 in their file's name, which reads the file once more. Folders of
            transformers have none.
        revision: branch, tag or commit in the repository; None: main.
        token: of the Hub; None: the one that `hf auth login` stored.

    Raises:
        KronblocksError: there is no such folder or repository; it has another format or is damaged; or it does not fit the
            model, which then is unchanged.
    """
    folder = downloaded(str(folder), revision, token) if looks_remote(folder) else Path(folder)
    if not (folder / CARD).exists() and is_own(folder):
        return read_own(folder, None if model is None else _made(model)).eval()
    as_saved = model is None
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
        else:
            model = _made(model)
        _load(file, model, card, folder, fill=True, as_saved=as_saved)
    return model.eval()


def _made(model: Any) -> nn.Module:
    """The model that the user gave, or that the function makes."""
    model = model() if callable(model) and not isinstance(model, nn.Module) else model
    if not isinstance(model, nn.Module):
        raise KronblocksError(
            f"from_pretrained needs a model, or a function that makes one, not {type(model).__name__}: "
            "from_pretrained(folder, model)"
        )
    return model


def _from_transformers(card: dict[str, Any], folder: Path) -> nn.Module:
    """A transformers model of the class and the sizes that the card names, not yet loaded."""
    if card.get("transformers") is None and not (folder / CONFIG).exists():
        raise KronblocksError(
            f"{folder} holds no config.json of a transformers model, so it does not say how to build the model: write "
            "from_pretrained(folder, model), or give a function that makes it"
        )
    own = card.get("transformers") or read_json(folder / CONFIG)  # older folders have it there only
    return built(own, card.get("generation"), folder, cast=card["format"] == 1)  # format 1 lacks the dtypes of other buffers


def _guarded(config: str) -> str:
    """A config with which transformers' own from_pretrained says how to load the folder, rather than load random weights."""
    return json.dumps({**json.loads(config), "transformers_weights": OTHER_FORMAT}, indent=2, sort_keys=True) + "\n"


def _load(file: Any, model: nn.Module, card: dict[str, Any], folder: Path, *, fill: bool, as_saved: bool = False) -> None:
    """Check that a weights' file fits a model, and with `fill` load it."""
    if fill:
        check_places(model)
    with unfolding(model, unfolded_names(card["structure"])):
        resized = resized_layers(model, card["resized"], folder)
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


def remove_card(folder: Path) -> None:
    """Remove a model of our own format from a folder that now holds one of transformers'; other files stay."""
    (folder / CARD).unlink(missing_ok=True)
    for path in folder.glob("model-*.safetensors"):
        if _WEIGHTS.fullmatch(path.name):
            path.unlink(missing_ok=True)


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
