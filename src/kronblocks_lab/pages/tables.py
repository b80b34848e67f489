"""The generated tables of docs/pretrained.md and docs/choosing.md."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kronblocks_lab.bench.page.tables import count, fill, table
from kronblocks_lab.pages import ROOT, time_to_quality

RESULTS = ROOT / "benchmarks" / "results"


def _over_seeds(values: Sequence[float], form: str) -> str:
    return f"{statistics.fmean(values):{form}} ± {statistics.stdev(values):{form.lstrip('+')}}"


def from_trained() -> list[str]:
    """A transformer trained dense, made sparse in several ways, against going on dense."""
    data = json.loads((RESULTS / "from-trained.json").read_text())
    settings, rows = data["settings"], data["rows"]
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["case"], {})[row["seed"]] = row
    on = found["dense, trained on"]
    lines = []
    for case, own in found.items():
        test = [100 * row["accuracy"] for row in own.values()]
        gained = [100 * (row["accuracy"] - row["dense"]) for row in own.values()]
        lost = [100 * (row["accuracy"] - on[seed]["accuracy"]) for seed, row in own.items()]
        cells = [_over_seeds([100 * row["start"] for row in own.values()], ".1f"), _over_seeds(test, ".2f")]
        cells += [_over_seeds(gained, "+.2f"), "" if own is on else _over_seeds(lost, "+.2f")]
        zeros = statistics.fmean(100 * row["sparsity"] for row in own.values())
        lines.append([case, f"{zeros:.1f}", *cells])
    size, patch, block, epochs = (settings[name] for name in ("image_size", "patch_size", "block_size", "epochs"))
    about = (
        f"{settings['data']}, a ViT of {settings['layers']} layers, width {settings['hidden_size']}, {size}x{size} images in "
        f"patches of {patch}x{patch}: {epochs} epochs dense, then {epochs} more. Blocks of {block}x{block}; the classifier and "
        "the patches stay dense. The teacher has half of the loss unless the row says otherwise, and `magnitude` has a budget "
        f"for each layer. Test accuracy in percent and points, mean ± standard deviation of {len(on)} seeds; torch "
        f"{data['versions']['torch']}. `examples/from_trained.py` trains, `kronblocks_lab.pages.from_trained` measures."
    )
    columns = ["how", "zeros %", "right after", "in the end", "against the dense model", "against it trained on"]
    return [*table(columns, lines), "", about]


def scores() -> list[str]:
    """Ways to compare blocks of different layers, on the MLP of the experiments and on a small decoder."""
    data = json.loads((RESULTS / "scores.json").read_text())
    mlp, decoder = ([row for row in data["rows"] if row["part"] == part] for part in ("mlp", "decoder"))
    columns = list(dict.fromkeys((row["method"], row["block"]) for row in mlp))
    runs = list(dict.fromkeys((row["method"], row["lr"], row["steps"]) for row in decoder))
    lines = []
    for way in dict.fromkeys(row["way"] for row in data["rows"]):
        cells = [way]
        for method, block in columns:
            found = {
                row["seed"]: 100 * row["accuracy"]
                for row in mlp
                if (row["method"], row["block"], row["way"]) == (method, block, way)
            }
            cells.append(_over_seeds(list(found.values()), ".2f") if found else "")
        for run in runs:
            here = [row for row in decoder if (row["method"], row["lr"], row["steps"]) == run and row["way"] == way]
            lost = [row["loss"] for row in here]
            fewest = min((density for row in here for density in row["densities"].values()), default=0.0)
            cells += [f"{statistics.fmean(lost):.3f}" if lost else "", f"{fewest:.3f}" if lost else ""]
        lines.append(cells)
    names = [f"MLP, {method}, {block}x{block}" for method, block in columns]
    for method, rate, steps in runs:
        names += [f"decoder, {method}, lr {rate:g}, {steps} steps", "its sparsest layer"]
    sparsity = {part: 100 * data["settings"][part]["target_sparsity"] for part in ("mlp", "decoder")}
    seeds = [len({row["seed"] for row in rows}) for rows in (mlp, decoder)]
    about = (
        f"MLP: validation accuracy in percent at {sparsity['mlp']:g}% zeros, mean ± standard deviation of {seeds[0]} seeds. "
        f"Decoder: validation loss in nats a character at {sparsity['decoder']:g}% zeros, mean of "
        f"{count(seeds[1], 'seed')}, and the density of the layer that kept least; torch {data['versions']['torch']}. "
        "`kronblocks_lab.pages.scores` trains."
    )
    return [*table(["compared by", *names], lines), "", about]


def pages() -> dict[Path, str]:
    """The pages with their tables, as they should be."""
    trained, choosing = ROOT / "docs" / "pretrained.md", ROOT / "docs" / "choosing.md"
    return {
        trained: fill(trained.read_text(), "from-trained", from_trained()),
        choosing: fill(fill(choosing.read_text(), "scores", scores()), "time", time_to_quality.rows(RESULTS)),
    }
