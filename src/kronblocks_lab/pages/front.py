"""The numbers and charts of README and of the site's first page.

All come from benchmarks/results. Where several machines were measured, numbers are the lowest.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from kronblocks_lab.bench.measure.results import Row, read
from kronblocks_lab.bench.page.tables import count, fill, find, table
from kronblocks_lab.pages import ROOT, time_to_quality
from kronblocks_lab.pages.front_figures import Bar, Line, accuracy, between, how_it_works, speed, times
from kronblocks_lab.reproduce.statistics import CellResult, at, cells, stale

RESULTS = ROOT / "benchmarks" / "results"
FIGURES = ROOT / "docs" / "figures"
OURS, BLOCK, SPARSITY, ROWS = "two-phase", "16", 0.9, 256


def _files(kind: str) -> list[dict[str, Any]]:
    """The results of one benchmark on CPUs in fp32, a file for each machine; that without a label first."""
    found = [read(path) for path in sorted(RESULTS.glob(f"bench-{kind}*.json"), key=lambda path: path.stem)]
    wanted = {"device": "cpu", "dtype": "float32", "quick": False}
    return [data for data in found if all(data["settings"].get(name, value) == value for name, value in wanted.items())]


def _bar(name: str, ratios: list[float], *, inference: bool = False) -> Bar:
    return Bar(name, min(ratios), max(ratios), inference)


def _training_ratio(data: dict[str, Any]) -> float:
    """How many times as fast as dense the whole training was."""
    own, dense = (find(data["rows"], method=method) for method in (OURS, "dense"))
    seconds = [statistics.median(row["train_seconds"] for row in rows) for rows in (dense, own)]
    return seconds[0] / seconds[1]


def training() -> Bar:
    """A whole training of the MLP."""
    return _bar("MLP, whole training", [_training_ratio(data) for data in _files("train")])


def inference(rows: int) -> Bar:
    """The exported MLP, for so many rows at a time."""
    case = f"exported, {100 * SPARSITY:g}% zeros, {BLOCK}x{BLOCK}"
    found = [row["speed"] for data in _files("deploy") for row in find(data["rows"], rows=rows, case=case)]
    return _bar(f"MLP, inference, {count(rows, 'input')} at a time", found, inference=True)


def _step(name: str, case: str) -> Bar:
    """One training step of the MLP; `case` begins like those that are meant, the best of them counts."""
    found = [[r["speed"] for r in find(data["rows"], rows=ROWS) if r["case"].startswith(case)] for data in _files("step")]
    return _bar(f"MLP, {name} training step", [max(speeds) for speeds in found if speeds])


def _model(name: str, case: str, *, inference: bool = False) -> Bar:
    found = [row["speed"] for data in _files("model-vit-tiny") for row in data["rows"] if row["case"].endswith(case)]
    return _bar(f"ViT-tiny, {name}", found, inference=inference)


def speeds() -> list[Bar]:
    """What the chart shows."""
    return [
        training(),
        _step("early", "factors r=8 16x16 per-row"),
        _step("late", f"packed 90% {BLOCK}x{BLOCK}"),
        _model("early training step", "discover (factors)"),
        _model("late training step", "after the lift (live blocks)"),
        inference(1),
        inference(ROWS),
        _model("inference", "exported", inference=True),
    ]


def _study(name: str) -> tuple[dict[str, Any], list[CellResult]]:
    data = read(RESULTS / f"reproduce-{name}.json")
    return data, cells(data["rows"])


def _at(found: list[CellResult], method: str, block: str = BLOCK) -> CellResult:
    return at(found, method, block, SPARSITY)


def _mark(found: list[CellResult]) -> list[str]:
    """A sentence where results are of earlier revisions of the methods."""
    rows = [row for cell in found for row in cell.rows]
    return ["These accuracies come from an earlier revision of the methods."] if stale(rows) else []


def _picture(name: str, alt: str, folder: str) -> list[str]:
    """A picture for light and dark pages."""
    return [
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{folder}/{name}-dark.svg">',
        f'<img alt="{alt}" src="{folder}/{name}-light.svg"></picture>',
    ]


def numbers() -> list[str]:
    """The three numbers and their conditions."""
    data, found = _study("mlp")
    dense, own = (_at(found, method).quality for method in ("dense", OURS))
    whole, one, many = training(), inference(1), inference(ROWS)
    columns = [
        f"{own - dense:+.1f} points".replace("-", "\N{MINUS SIGN}"),
        f"{times(whole.low)} as fast",
        f"{times(many.low)} as fast",
    ]
    told = [
        f"**test accuracy**: {own:.1f}%, dense {dense:.1f}%",
        f"**training**, start to end; {times(whole.high)} on another machine",
        f"**inference**, {ROWS} inputs at a time; {times(one.low)} for one",
    ]
    rule = [":---:"] * len(columns)
    settings = data["settings"]
    widths = "-".join(map(str, settings["widths"]))
    wide = "-".join(map(str, _files("train")[0]["settings"]["widths"]))
    deep, side = (_files("deploy")[0]["settings"][name] for name in ("layers", "width"))
    about = [
        f"Fashion-MNIST, {100 * SPARSITY:g}% zeros in {BLOCK}x{BLOCK} blocks, fp32, {settings['epochs']} epochs, 2 CPU cores.",
        f"Accuracy: MLP {widths}, mean of {len(own_rows(found))} seeds.",
        f"Times: MLP {wide}, and for inference an exported model of {deep} layers of {side}x{side}.",
        f"Speeds are the lowest over the machines measured: {len(_files('train'))} for training, "
        f"{len(_files('deploy'))} for inference.",
        *_mark(found),
    ]
    return [f"| {' | '.join(line)} |" for line in (columns, rule, told)] + ["", *about]


def own_rows(found: list[CellResult]) -> list[Row]:
    """The trainings behind the accuracy."""
    return _at(found, OURS).rows


def lines() -> tuple[float, list[Line]]:
    """Dense's accuracy, and those of all methods by sparsity."""
    data, found = _study("mlp")
    methods = [method for method in data["settings"]["methods"] if method != "dense"]
    points = {m: {c.sparsity: c.quality for c in found if (c.method, c.block) == (m, BLOCK)} for m in methods}
    return _at(found, "dense").quality, [Line(method, own) for method, own in points.items()]


def accuracy_chart(folder: str) -> list[str]:
    """The chart of accuracies, and what it shows."""
    data, found = _study("mlp")
    dense, own = (_at(found, method).quality for method in ("dense", OURS))
    methods = [method for method in data["settings"]["methods"] if method not in ("dense", OURS)]
    best = max((_at(found, method) for method in methods), key=lambda cell: cell.quality)
    alt = (
        f"Test accuracy of {len(methods) + 1} methods from 50% to 95% zeros. At 90% {OURS} has {own:.1f}%, dense {dense:.1f}%, "
        f"and the best other method, {best.method}, {best.quality:.1f}%."
    )
    about = (
        f"MLP {'-'.join(map(str, data['settings']['widths']))} on Fashion-MNIST, mean of {len(own_rows(found))} seeds.",
        "Every method was tuned alike on validation images.",
    )
    return [*_picture("accuracy", alt, folder), "", *about, *_mark(found)]


def speed_chart(folder: str) -> list[str]:
    """The chart of speeds, and what it shows."""
    bars, images = speeds(), _files("model-vit-tiny")[0]["settings"]["batch_size"]
    alt = f"Times as fast as dense PyTorch: {'; '.join(f'{bar.name}: {between(bar)}' for bar in bars)}."
    about = (
        "Solid bars end at the slowest machine that was measured, faint bars at the fastest.",
        "Early steps train all blocks through shared numbers, late steps train live blocks only.",
        f"A step of the MLP has {ROWS} inputs; ViT-tiny has batches of {images} images.",
    )
    return [*_picture("speed", alt, folder), "", *about]


def picture(folder: str) -> list[str]:
    """How it works."""
    alt = "A matrix of blocks: all mix shared tiles; then most are zero; then each live block has weights of its own."
    return _picture("how-it-works", alt, folder)


def dense_wins() -> list[str]:
    """Where dense is as good or better: a table of at most ten rows."""
    (ops,) = (data for data in _files("ops") if "label" not in data["settings"])
    _, lenet = _study("lenet5-fashion")
    lost = _at(lenet, OURS, "4").quality - _at(lenet, "dense").quality

    def layer(case: str, rows: int, direction: str, **where: Any) -> str:
        place = {"shape": "1024x1024", "block": "4x4", "rows": rows, "direction": direction}
        return times(max(row["speed"] for row in find(ops["rows"], **place, **where) if row["case"].startswith(case)))

    case = "dense, int8 (torch, dynamic)"
    int8 = max(row["speed"] for data in _files("deploy") for row in find(data["rows"], rows=1, case=case))
    both, rank4 = "forward+backward", "factors r=4 per-row"
    shown = [
        ["one layer, one input, half of the 4x4 blocks live", layer("values packed", 1, "forward", density=0.5)],
        ["training one layer, 256 inputs, all 4x4 blocks live", layer(rank4, 256, both, density=1)],
        ["the same with 16 inputs", layer(rank4, 16, both, density=1)],
        ["early training steps of the MLP, on an older CPU (AVX2)", times(_step("early", "factors r=8 16x16 per-row").low)],
        ["fp32 inference of the MLP, one input, against dense in int8", times(inference(1).low / int8)],
    ]
    share = f"{100 * SPARSITY:g}%"
    about = f"Small models also lose accuracy: LeNet-5 at {share} zeros in 4x4 blocks ends {-lost:.1f} points below dense."
    return [*table(["where", "speed (dense: 1)"], shown), "", about]


def pages() -> dict[Path, str]:
    """README and the first page as they should be."""
    found = {}
    for path, folder in ((ROOT / "README.md", "docs/figures"), (ROOT / "docs" / "index.md", "figures")):
        text = fill(path.read_text(), "numbers", numbers())
        text = fill(text, "picture", picture(folder))
        text = fill(text, "speed", speed_chart(folder))
        if path.name == "README.md":
            text = fill(text, "accuracy", accuracy_chart(folder))
            text = time_to_quality.with_section(text, RESULTS, folder)
            text = fill(text, "dense", dense_wins())
        found[path] = text
    return found


def draw(folder: Path) -> None:
    """All pictures, as SVG."""
    dense, methods = lines()
    accuracy(folder / "accuracy", f"Test accuracy, {BLOCK}x{BLOCK} blocks", dense, methods, OURS)
    speed(folder / "speed", f"Speed at {100 * SPARSITY:g}% zeros in {BLOCK}x{BLOCK} blocks", speeds())
    how_it_works(folder / "how-it-works")
    time_to_quality.draw(RESULTS, folder)
