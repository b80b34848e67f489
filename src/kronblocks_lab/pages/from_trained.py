"""A trained transformer made block-sparse in several ways: `python -m kronblocks_lab.pages.from_trained`, half an hour."""

from __future__ import annotations

import copy
import importlib.util
import json
import time
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kronblocks import Distillation, SparsityConfig, sparsify_
from kronblocks.core.files import read_json, write_json
from kronblocks_lab.data.sets import load_data
from kronblocks_lab.pages import ROOT
from kronblocks_lab.training.versions import versions

RESULTS = ROOT / "benchmarks" / "results" / "from-trained.json"
SETTINGS: dict[str, Any] = {
    **{"data": "mnist5k", "image_size": 28, "patch_size": 7, "hidden_size": 96, "layers": 4},
    **{"epochs": 20, "block_size": 16, "target_sparsity": 0.8, "threads": 1},
}
SEEDS = (0, 1, 2)
NEAREST = {"init": "nearest"}
CASES: dict[str, tuple[dict[str, Any] | None, float]] = {  # what sparsify_ gets, and the teacher's share of the loss
    "dense, trained on": (None, 0.0),
    "rigl, nearest": ({"method": "rigl", **NEAREST}, 0.5),
    "rigl, nearest, no teacher": ({"method": "rigl", **NEAREST}, 0.0),
    "rigl, nearest, uniform": ({"method": "rigl", **NEAREST, "distribution": "uniform"}, 0.5),
    "static, nearest": ({"method": "static", **NEAREST}, 0.5),
    "magnitude, packed": ({"method": "magnitude", "storage": "packed", "scope": "layer"}, 0.5),
    "two-phase, nearest": ({"method": "two-phase", **NEAREST}, 0.5),
    "two-phase, random (drops the weights)": ({"method": "two-phase", "init": "random"}, 0.5),
}


def _example() -> ModuleType:
    """The code of `examples/from_trained.py`, which trains."""
    spec = importlib.util.spec_from_file_location("example", ROOT / "examples" / "from_trained.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _convert(
    example: ModuleType, dense: torch.nn.Module, case: str, images: Tensor, labels: Tensor, test: tuple[Tensor, Tensor]
) -> dict[str, Any]:
    settings, weight = CASES[case]
    model = copy.deepcopy(dense)
    distillation = Distillation.of(model, weight=weight) if weight else None
    sizes = {name: SETTINGS[name] for name in ("block_size", "target_sparsity")}
    config = SparsityConfig(**sizes, exclude=("classifier",), **settings) if settings is not None else None
    sparsifier = None if config is None else sparsify_(model, config)
    start = example.accuracy(model, *test)
    clock = time.perf_counter()
    example.train(model, images, labels, epochs=SETTINGS["epochs"], sparsifier=sparsifier, distillation=distillation)
    return {
        "start": start,
        "seconds": round(time.perf_counter() - clock, 1),
        "sparsity": sparsifier.sparsity if sparsifier is not None else 0.0,
        "accuracy": example.accuracy(model, *test),
    }


def main() -> None:
    """Train what is missing in the results."""
    torch.set_num_threads(SETTINGS["threads"])
    example = _example()
    data = load_data(SETTINGS["data"])
    images, labels, test = data.train.images, data.train.labels, (data.test.images, data.test.labels)
    found = read_json(RESULTS) if RESULTS.exists() else {"settings": SETTINGS, "versions": versions(), "rows": []}
    if found["settings"] != json.loads(json.dumps(SETTINGS)):
        raise SystemExit(f"{RESULTS} is of other settings: remove it")
    for seed in SEEDS:
        missing = [case for case in CASES if not any(row["seed"] == seed and row["case"] == case for row in found["rows"])]
        if not missing:
            continue
        torch.manual_seed(seed)
        dense = example.make(**{name: SETTINGS[name] for name in ("image_size", "patch_size", "hidden_size", "layers")})
        example.train(dense, images, labels, epochs=SETTINGS["epochs"])
        dense_accuracy = example.accuracy(dense, *test)
        for case in missing:
            torch.manual_seed(1000 + seed)
            row = {"seed": seed, "case": case, "dense": dense_accuracy, **_convert(example, dense, case, images, labels, test)}
            found["rows"].append(row)
            write_json(RESULTS, found)
            print(row, flush=True)


if __name__ == "__main__":
    main()
