"""The page's parts of files beside the main ones: other devices and precisions, the authors' benchmark, whole models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kronblocks_lab.bench.measure.results import read
from kronblocks_lab.bench.page.tables import (
    Row,
    count,
    dense_of,
    deployed_about,
    deployed_table,
    factors_table,
    find,
    group,
    inference_table,
    is_ours,
    ms,
    ratio,
    ratios_of,
    roof,
    spread,
    step_tables,
    table,
    values_table,
)

TITLES = {
    **{"step": "Training steps", "ops": "One layer", "infer": "Inference", "model": "A whole model"},
    "deploy": "A whole exported model",
}


def others(folder: Path) -> list[dict[str, Any]]:
    """What there is beside a file of each kind, by name; each gets its `name`."""
    paths = [path for kind in TITLES for path in sorted(folder.glob(f"bench-{kind}-*.json"))]
    return [{"name": path.stem.removeprefix("bench-"), **read(path)} for path in paths]


def other_part(data: dict[str, Any]) -> list[str]:
    """One file's part of the page."""
    kind = data["kind"]
    makers = {"step": _step, "ops": _ops, "infer": _infer, "model": _model, "deploy": _deploy}
    return [f"## {TITLES[kind]}: {data['name']}", "", *_about(data), *makers[kind](data)]


def _about(data: dict[str, Any]) -> list[str]:
    machine = data["machine"]
    measured = (
        f"In the same run a dense product ({machine['product']}) at {machine['product_gflops']:g} GFLOP/s, and copies at up to "
        f"{max(machine['copy_gb_per_s']):g} GB/s; products computed by {' '.join(machine['backend'].split()[:2])}."
    )
    left_out = [f"{name} ({reason})" for name, reason in data.get("skipped", {}).items()]
    return [ratios_of(data), "", measured, "", *([f"Not everywhere: {'; '.join(left_out)}.", ""] if left_out else [])]


def _deploy(data: dict[str, Any]) -> list[str]:
    return [*deployed_about(data["settings"]), *deployed_table(data["rows"]), ""]


def _step(data: dict[str, Any]) -> list[str]:
    settings = data["settings"]
    width = settings["width"]
    grid = " The grid of the paper's authors: ranks 1, 2, 4, blocks of 2, 4, 8." if settings.get("authors") else ""
    text = (
        f"MLP {width}-{width}-{width}-10: forward, cross-entropy, backward, Adam; the two large layers of the kind named.{grid}"
    )
    return [text, "", *step_tables(data)]


def _ops(data: dict[str, Any]) -> list[str]:
    text, rows = [], data["rows"]
    for shape in dict.fromkeys(row["shape"] for row in rows):
        here = find(rows, shape=shape)
        text += [f"### {shape}: live blocks", "", *values_table(here), "", f"### {shape}: factors", "", *factors_table(here), ""]
        text += [f"### {shape}: against the roofline", "", *_roofline(here), ""]
    return text


def _roofline(rows: Sequence[Row]) -> list[str]:
    """Our fastest case of each place: what it reaches of the limit by multiply-adds and bytes, and its memory."""
    lines = []
    for (block, density, direction, number), here in group(rows, "block", "density", "direction", "rows").items():
        own = [row for row in here if is_ours(row)]
        if not own:
            continue
        best, dense = max(own, key=lambda row: row["speed"]), find(here, case="dense")
        bound = min(best["macs_bound"], best["bytes_bound"])
        cells = [ratio(best["speed"]), ratio(best["macs_bound"]), ratio(best["bytes_bound"])]
        memory = ""
        if best.get("peak_bytes") is not None and dense and dense[0]["peak_bytes"]:
            memory = f"{best['peak_bytes'] / 2**20:.0f} MiB, {ratio(best['peak_bytes'] / dense[0]['peak_bytes'])}"
        place = f"{block}, density {density:g}, {count(number, 'row')}, {direction}"
        lines.append([place, best["case"], f"{best['gflops']:.0f}", *cells, f"{100 * best['speed'] / bound:.0f}%", memory])
    columns = ["where", "fastest of ours", "GFLOP/s of live work", "ratio", "bound by multiply-adds", "by bytes", "reached"]
    return table([*columns, "peak memory, to dense"], lines, left=2)


def _infer(data: dict[str, Any]) -> list[str]:
    text, rows = [], data["rows"]
    for shape in dict.fromkeys(row["shape"] for row in rows):
        text += [f"### {shape}, in inference", "", *inference_table(find(rows, shape=shape)), ""]
    return text


def _model(data: dict[str, Any]) -> list[str]:
    settings, rows = data["settings"], data["rows"]
    size, lines, counted = settings["image_size"], [], any(map(roof, rows))
    for row in rows:
        dense = find(rows, case="dense", direction=row["direction"])[0]
        memory = ""
        if row["peak_bytes"] is not None:
            memory = f"{row['peak_bytes'] / 2**20:.0f} MiB, {ratio(row['peak_bytes'] / dense['peak_bytes'])}"
        share = ratio(row["parameters"] / dense["parameters"])
        cells = [ms(row["ms"]), f"{row['images_per_second']:.1f}", spread(row), *([roof(row)] if counted else []), share, memory]
        lines.append([row["direction"], row["case"], *cells])
    about = (
        f"{settings['model']} on {size}x{size} images, {count(settings['batch_size'], 'image')} a step, AdamW. Blocks of "
        f"{settings['block_size']} or the nearest size that divides, {100 * settings['sparsity']:g}% zeros, a dense classifier. "
        "two-phase is timed in two states: with factors and all blocks alive, as at the start, and with random live blocks at "
        "the final density, as after the lift. Peak memory is that of three steps in a separate process."
    )
    columns = ["what", "model", "ms", "images a second", f"ratio to {dense_of(settings)}", *(["roof"] if counted else [])]
    return [about, "", *table([*columns, "parameters to dense", "peak memory, to dense"], lines, left=2), ""]
