"""The card of a saved model, README.md: task, sparsity, block sizes, accuracy where it is known, and how to load it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from kronblocks.core.errors import KronblocksError
from kronblocks.core.files import write_text
from kronblocks.surgery.records import RECORDED, layers_of

CARD_FILE = "README.md"
TAGS = ("kronblocks", "block-sparse")
MARK = "<!-- kronblocks writes this card again at each save: remove this line to keep your changes -->"
SCORES = "kronblocks_scores"
"""The attribute of a model that has its known scores by name."""

_EMPTY = "This model card has been automatically generated"  # what transformers' template says
_TASKS = {  # by the end of the class's name: the Hub's word
    "ForCausalLM": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForImageClassification": "image-classification",
    "ForObjectDetection": "object-detection",
    "ForSemanticSegmentation": "image-segmentation",
}


def note_scores(model: nn.Module, scores: Mapping[str, float]) -> None:
    """Remember what was measured of a model, such as its accuracy on held-out data, for its card."""
    known = {name: float(value) for name, value in scores.items() if isinstance(value, int | float)}
    setattr(model, SCORES, {**getattr(model, SCORES, {}), **known})


def write_card(folder: Path, model: nn.Module, metadata: Mapping[str, Any] | None = None) -> None:
    """Write README.md, unless there is one that somebody wrote.

    Args:
        folder: exists.
        model: the saved model.
        metadata: texts that its user gave.

    Raises:
        KronblocksError: it cannot be written.
    """
    path = folder / CARD_FILE
    try:
        there = path.read_text(encoding="utf-8", errors="replace") if path.exists() else MARK
        if MARK in there or _EMPTY in there:
            write_text(path, card_of(model, metadata))
    except OSError as error:
        raise KronblocksError(f"cannot write {path}: {error}") from error


def card_of(model: nn.Module, metadata: Mapping[str, Any] | None = None) -> str:
    """The text of a model's card."""
    name, own = type(model).__name__, type(model).__module__.startswith("transformers.")
    task = next((word for end, word in _TASKS.items() if name.endswith(end)), None)
    head = {"library_name": "transformers" if own else "kronblocks", "tags": list(TAGS)}
    head |= {"pipeline_tag": task} if task else {}
    rows = {"model": name, **({"task": task} if task else {}), **_sparsity(model)}
    rows |= {key.removeprefix("eval_"): f"{value:.6g}" for key, value in getattr(model, SCORES, {}).items()}
    rows |= {str(key): str(value) for key, value in (metadata or {}).items()}
    table = "\n".join(f"| {_cell(key)} | {_cell(value)} |" for key, value in rows.items())
    yaml = "\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items())  # JSON is YAML
    return (
        f"---\n{yaml}\n---\n\n{MARK}\n\n# {name} with block-sparse weights\n\n| | |\n| --- | --- |\n{table}\n\n"
        f"## Load it\n\n```sh\npip install kronblocks{' transformers' * own}\n```\n\n```python\n{_how_to_load(name, own)}\n```\n"
    )


def _how_to_load(name: str, own: bool) -> str:
    if not own:
        return 'import kronblocks\n\nmodel = kronblocks.from_pretrained("NAME_OR_FOLDER", make)  # make() gives the dense model'
    end = next((end for end in _TASKS if name.endswith(end)), None)
    auto = f"AutoModel{end}" if end else name
    return (
        f"import kronblocks  # lets transformers know block-sparse layers\nfrom transformers import {auto}\n\n"
        f'model = {auto}.from_pretrained("NAME_OR_FOLDER")'
    )


def _sparsity(model: nn.Module) -> dict[str, str]:
    layers = list(layers_of(model, RECORDED).values())
    sizes = [layer.in_features * layer.out_features for layer in layers]
    if not sizes or any(layer.block_mask.is_meta for layer in layers):
        return {"block-sparse layers": str(len(layers))}
    live = sum(size * layer.density for size, layer in zip(sizes, layers, strict=True))
    kinds = sorted({layer.kind for layer in layers})
    return {
        "weights in zero blocks": f"{1 - live / sum(sizes):.1%} of {sum(sizes):,}, in {len(layers)} layers",
        "block size": ", ".join(sorted({str(layer.grid.block) for layer in layers})),
        "layers": ", ".join(kinds),
    }


def _cell(text: str) -> str:
    """A text that stays in its cell of a table."""
    return re.sub(r"\s+", " ", text.replace("|", "\\|")).strip()
