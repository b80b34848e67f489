"""`kronblocks bench tables`: the tables of all results, from the JSON files; a part without a file is left out."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kronblocks.core.blocks import BlockSize
from kronblocks.core.errors import KronblocksError
from kronblocks.core.files import write_text
from kronblocks_lab.bench.cases.ways import BOTH, FORWARD
from kronblocks_lab.bench.measure.results import read
from kronblocks_lab.bench.ops import FACTOR_DENSITIES, PEER_DENSITY, PEER_MACS, TRAINING_ROWS
from kronblocks_lab.bench.page.figures import packed_figure, step_figure
from kronblocks_lab.bench.page.machines import account_part, conv_part, files_of, precision_part
from kronblocks_lab.bench.page.short import short_part
from kronblocks_lab.bench.page.summary import summary_table
from kronblocks_lab.bench.page.tables import (
    Row,
    auto_table,
    count,
    deployed_about,
    deployed_table,
    factors_table,
    fill_or_add,
    find,
    inference_table,
    kept,
    ratio,
    ratios_of,
    step_tables,
    table,
    values_table,
    where,
)
from kronblocks_lab.bench.page.variants import other_part, others

KINDS = ("ops", "step", "infer", "deploy", "train")
BY_MACHINE = {"precision": precision_part, "conv": conv_part, "account": account_part}


def _load(folder: Path) -> dict[str, dict[str, Any]]:
    found = {kind: folder / f"bench-{kind}.json" for kind in KINDS}
    return {kind: read(path) for kind, path in found.items() if path.exists()}


def _train_medians(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Medians over the seeds, by method."""
    methods = dict.fromkeys(row["method"] for row in rows)
    measured = [name for name in rows[0] if name not in ("method", "seed")]
    return {m: {name: statistics.median(row[name] for row in find(rows, method=m)) for name in measured} for m in methods}


def _step_part(data: dict[str, Any], figures: Path) -> list[str]:
    rows, width = data["rows"], data["settings"]["width"]
    step_figure(rows, figures / "bench-step.png")
    text = [
        "## A training step",
        "",
        f"MLP {width}-{width}-{width}-10: forward, cross-entropy, backward, Adam, `zero_grad`. The two large layers are of the "
        "kind named; the last is dense. Peak memory is that of a process of its own, above the loaded data. The allocator gives "
        "freed tensors back at once there: glibc's habit of keeping them moves a peak of 200 MiB by 30 either way, for every "
        f"model. Losses are the first and the last of {data['settings']['loss_steps']} steps on one batch. *authors* is the "
        "layer as the paper's authors write it, in plain PyTorch.",
        "",
        ratios_of(data),
        "",
        "![Time of one training step](figures/bench-step.png)",
        "",
    ]
    return [*text, *step_tables(data)]


def _training_rows(data: dict[str, Any]) -> list[str]:
    """All methods, medians over seeds."""
    medians, lines = _train_medians(data["rows"]), []
    for method, middle in medians.items():
        own = find(data["rows"], method=method)
        times = [row["train_seconds"] for row in own]
        cells = [f"{middle['train_seconds']:.1f} ({min(times):.1f} to {max(times):.1f})", f"{100 * middle['test_accuracy']:.2f}"]
        cells += [f"{100 * middle['block_sparsity']:.2f}", f"{middle['peak_memory_bytes'] / 2**20:.0f}"]
        if (dense := medians.get("dense")) is not None:
            names = ("train_seconds", "peak_memory_bytes", "training_macs", "trainable_parameters_max")
            cells += [ratio(middle[name] / dense[name]) for name in names]
        lines.append([method, *cells])
    relative = ["time", "memory", "multiply-adds", "parameters"] if "dense" in medians else []
    columns = ["method", "seconds", "test accuracy %", "zero blocks %", "peak MiB", *(f"{name}, to dense" for name in relative)]
    return [ratios_of(data), "", *table(columns, lines), ""]


def _train_part(data: dict[str, Any]) -> list[str]:
    settings, seeds = data["settings"], len({row["seed"] for row in data["rows"]})
    widths = "-".join(map(str, settings["widths"]))
    return [
        "## Whole trainings",
        "",
        f"{settings['data']}, MLP with hidden layers {widths}, {BlockSize.parse(settings['block_size'])} blocks, "
        f"{100 * settings['sparsity']:g}% zeros, {settings['epochs']} epochs, batch {settings['batch_size']}. Medians of "
        f"{count(seeds, 'seed')}, the methods in turns, each training in a process of its own. Relative columns below 1 are less "
        "than dense fp32. Every method has its defaults, untuned: accuracies with settings of their own are on "
        "[the experiments' page](experiments.md).",
        "",
        *_training_rows(data),
    ]


def _trainings(folder: Path) -> list[dict[str, Any]]:
    """The same on other machines."""
    return [read(path) for path in sorted(folder.glob("bench-train-*.json"))]


def _shapes(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["shape"] for row in rows))


def _roofline(data: dict[str, Any]) -> list[str]:
    machine, lines = data["machine"], []
    for row in data["rows"]:
        if row["case"] == "values packed" and row["shape"] == "1024x1024" and row["density"] == 0.1 and row["rows"] >= 256:
            bound = min(row["macs_bound"], row["bytes_bound"])
            bounds = [
                ratio(row["speed"]),
                ratio(row["macs_bound"]),
                ratio(row["bytes_bound"]),
                f"{100 * row['speed'] / bound:.0f}%",
            ]
            lines.append([f"{row['block']}, {row['rows']:,} rows, {row['direction']}", f"{row['gflops']:.0f}", *bounds])
    copies = ", ".join(f"{rate:g} ({size} MiB)" for size, rate in zip(machine["copy_mib"], machine["copy_gb_per_s"], strict=True))
    bytes_note = "Bytes that must move are those of x, y and the weight once, and of their gradients with backward."
    columns = ["packed, 1024x1024, 90% zeros", "GFLOP/s of live work", "ratio", "bound by multiply-adds", "by bytes", "reached"]
    measured = (
        f"The same machine, in the same run: a dense product ({machine['product']}) at {machine['product_gflops']:g} GFLOP/s; "
        f"copies, read plus written, at {copies} GB/s."
    )
    return ["### Against the roofline", "", f"{measured} {bytes_note}", "", *(table(columns, lines) if lines else []), ""]


def _ops_part(data: dict[str, Any], figures: Path) -> list[str]:
    rows = data["rows"]
    densities = ", ".join(f"{density:g}" for density in FACTOR_DENSITIES)
    scope = (
        f"Forward without gradients, and forward + backward (dx and all parameters' gradients) from {TRAINING_ROWS} rows on. "
        f"Factors are timed at densities {densities}. Other libraries, which have no backward, are timed up to density "
        f"{PEER_DENSITY:g} and {PEER_MACS:.0e} multiply-adds. The authors' forms cannot skip dead blocks, so they are timed "
        "at density 1."
    )
    text = ["## One layer, forward and backward", "", scope, "", ratios_of(data), ""]
    for number in (256, 2048):
        name = f"bench-packed-{number}.png"
        if packed_figure(rows, "1024x1024", number, figures / name):
            text += [f"![Speed to dense against density, {number} rows](figures/{name})", ""]
    text += ['### What "auto" chooses', "", "Forward + backward, 256 rows and more.", "", *auto_table(rows, BOTH, 256), ""]
    text += _roofline(data)
    for peer, reason in data.get("skipped", {}).items():
        text += [f"Not everywhere: {peer} ({reason}).", ""]
    for shape in _shapes(rows):
        here = find(rows, shape=shape)
        text += [f"### {shape}: free values, packed", "", *values_table(here), ""]
        if any(row["rank"] is not None for row in here):
            text += [f"### {shape}: factors, best plan", "", *factors_table(here), ""]
    return text


def _infer_part(data: dict[str, Any]) -> list[str]:
    rows = data["rows"]
    text = ["## Inference", "", "One layer, `torch.inference_mode`.", "", ratios_of(data), ""]
    text += [
        '### What "auto" chooses in inference',
        "",
        "All rows; a finished layer may also become an `nn.Linear` (dense), and factors may become packed values.",
        "",
    ]
    text += [*auto_table(rows, FORWARD, 1), ""]
    for shape in _shapes(rows):
        text += [f"### {shape}, in inference", "", *inference_table(find(rows, shape=shape)), ""]
    return text


def _deploy_part(data: dict[str, Any]) -> list[str]:
    return [
        "## A whole exported model",
        "",
        *deployed_about(data["settings"]),
        where(data),
        "",
        *deployed_table(data["rows"]),
        "",
    ]


def write(folder: Path, page: Path) -> Path:
    """Write the tables of the page between its markers, and its figures beside it; returns the page.

    Raises:
        KronblocksError: a file is damaged, or the page cannot be written.
    """
    parts, figures = _load(folder), page.parent / "figures"
    try:
        figures.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KronblocksError(f"cannot write into {page.parent}: {error.strerror}; choose another --page") from error
    variants, trainings = others(folder), _trainings(folder)
    by_machine = {kind: files_of(folder, kind) for kind in BY_MACHINE}
    measured = [data for files in by_machine.values() for data in files.values()]
    summary = summary_table([*parts.values(), *trainings, *variants, *measured])
    text = ["## Summary", "", *summary, ""] if summary else []
    if "step" in parts:
        text += _step_part(parts["step"], figures)
    if "train" in parts:
        text += _train_part(parts["train"]) + [line for data in trainings for line in _training_rows(data)]
    for kind, make in BY_MACHINE.items():
        text += make(by_machine[kind]) if by_machine[kind] else []
    if "deploy" in parts:
        text += _deploy_part(parts["deploy"])
    if "ops" in parts:
        text += _ops_part(parts["ops"], figures)
    if "infer" in parts:
        text += _infer_part(parts["infer"])
    text += short_part(folder)
    for data in variants:
        text += other_part(data)
    before = kept(page, "Benchmarks", "kronblocks bench tables")
    write_text(page, fill_or_add(before, "benchmarks", text[:-1], "Results"))
    return page
