"""Write the generated tables of README.md and docs/pretrained.md from benchmarks/results: `python benchmarks/tables.py`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kronblocks.experiments.bench import page as speed
from kronblocks.experiments.bench.tables import fill, table
from kronblocks.experiments.reproduce import page as accuracy
from kronblocks.files import write_text

ROOT = Path(__file__).parent.parent
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
        f"patches of {patch}x{patch}: {epochs} epochs dense, then {epochs} more; blocks of {block}x{block}, the classifier and "
        "the patches dense, the teacher with half of the loss unless it says so, `magnitude` with a budget for each layer. Test "
        f"accuracy in percent and points, mean ± standard deviation of {len(on)} seeds; torch {data['versions']['torch']}. The "
        "code of `examples/from_trained.py` trains, `benchmarks/from_trained.py` measures."
    )
    columns = ["how", "zeros %", "right after", "in the end", "against the dense model", "against it trained on"]
    return [*table(columns, lines), "", about]


def pages() -> dict[Path, str]:
    """The pages with their tables, as they should be."""
    readme, trained = ROOT / "README.md", ROOT / "docs" / "pretrained.md"
    text = fill(readme.read_text(), "accuracy", accuracy.summary(RESULTS))
    return {
        readme: fill(text, "speed", speed.summary(RESULTS)),
        trained: fill(trained.read_text(), "from-trained", from_trained()),
    }


if __name__ == "__main__":
    for path, content in pages().items():
        write_text(path, content)
