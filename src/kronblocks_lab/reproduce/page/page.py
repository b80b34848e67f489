"""`kronblocks reproduce tables`: the tables of the experiments' page, from the JSON files; its prose is written by hand."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from kronblocks.core.blocks import BlockSize
from kronblocks.core.errors import KronblocksError
from kronblocks.core.files import write_text
from kronblocks_lab.bench.measure.results import Row, read
from kronblocks_lab.bench.page.tables import count, fill_or_add, kept, table
from kronblocks_lab.report.costs import BYTES
from kronblocks_lab.report.measures import ACCURACY, measure_of
from kronblocks_lab.reproduce import searches
from kronblocks_lab.reproduce.page.figures import draw
from kronblocks_lab.reproduce.page.published import FOOTNOTE, PUBLISHED
from kronblocks_lab.reproduce.statistics import OURS, CellResult, at, cells, stale
from kronblocks_lab.reproduce.studies import has_cell
from kronblocks_lab.reproduce.trials import words
from kronblocks_lab.training.decoder import DecoderSize


def write(results: Path, page: Path) -> Path:
    """Write the tables of the page between its markers, and its figures beside it; returns its path.

    A study without a place on the page gets one at its end.

    Raises:
        KronblocksError: there are no results.
    """
    files, searched = sorted(results.glob("reproduce-*.json")), results / f"{searches.NAME}.json"
    if not files and not searched.exists():
        raise KronblocksError(f"{results} holds no reproduce-*.json: run kronblocks reproduce mlp first, or name another folder")
    text = kept(page, "Experiments", "kronblocks reproduce tables")
    if overview := _overview(results):
        text = fill_or_add(text, "summary", overview, "Summary")
    for file in files:
        name, data = file.stem.removeprefix("reproduce-"), read(file)
        lines = _study(data)
        if picture := _picture(name, data, page):
            lines += [f"![Test {measure_of(data['settings']).name} over sparsity]({picture})", ""]
        text = fill_or_add(text, name, lines[:-1], name)
    if searched.exists():
        text = fill_or_add(text, "search", searches.page(read(searched))[:-1], "Search for the block size")
    write_text(page, text)
    return page


def _overview(results: Path) -> list[str]:
    """The short table first, once all its trainings are there."""
    try:
        return summary(results)
    except KronblocksError:  # trainings are missing
        return []


def _picture(name: str, data: dict[str, Any], page: Path) -> str | None:
    """The figure of a study with several sparsities, beside the page; its address there."""
    found = cells(data["rows"], measure_of(data["settings"]))
    if data["settings"]["variants"] or len({cell.sparsity for cell in found if cell.block}) < 3:
        return None
    about = f"{data['settings']['data']}, {data['settings']['model']}, {len(found[0].rows)} seeds"
    draw(found, page.parent / "figures" / f"experiments-{name}.png", about)
    return f"figures/experiments-{name}.png"


def summary(results: Path, study: str = "mlp", blocks: Sequence[str] = ("4", "16"), sparsity: float = 0.9) -> list[str]:
    """The lines of a short table: every method of a study at some block sizes and one sparsity."""
    data = read(results / f"reproduce-{study}.json")
    found, settings = cells(data["rows"]), data["settings"]
    columns = ["method"]
    for block in blocks:
        size = BlockSize.parse(block)
        columns += [f"{size}: test accuracy %", f"{OURS} minus it", "parameters, most", "multiply-adds"]
    rows = []
    for method in settings["methods"]:
        row = [method]
        for block in blocks:
            own, ours = (at(found, name, block, sparsity) for name in (method, OURS))
            best = max(cell.quality for cell in found if (cell.block, cell.sparsity) == (block, sparsity))
            accuracy = own.spread_of()
            row += [f"**{accuracy}**" if own.block and own.quality == best else accuracy]
            row += ["" if own is ours else str(ours.against(own))]
            row += [f"{own.to_dense(name):.2f}" for name in ("trainable_parameters_max", "training_macs")]
        rows.append(row)
    widths = "-".join(map(str, settings["widths"]))
    about = (
        f"{settings['data']}, MLP with hidden layers {widths}, {settings['epochs']} epochs, batch {settings['batch_size']}, "
        f"{100 * sparsity:g}% of the weights in zero blocks, mean ± standard deviation of {len(found[0].rows)} seeds. Differences"
        " are in points, with their 95% interval over pairs of the same seed. Parameters that are trained at the most and "
        f"multiply-adds of training are relative to dense. Every method was tuned alike on validation, so {OURS} has rank 8 "
        f"here, where the default is 4 at 4x4. torch {data['versions']['torch']}."
    )
    lines, outdated = [*table(columns, rows), "", about], _stale(data["rows"])
    return [*lines, "", *outdated[:-1]] if outdated else lines


def _study(data: dict[str, Any]) -> list[str]:
    settings = data["settings"]
    found = cells(data["rows"], measure_of(settings))
    if not found:
        return []
    images = f" ({settings['train_images']:,} training images)" if settings.get("train_images") else ""
    lines = [
        f"{settings.get('source') or settings['data']}{images}, {settings['model']}{_sizes_of(settings)}, "
        f"{_length(settings)}, batch {settings['batch_size']}, "
        f"{len(found[0].rows)} seeds; {data['versions']['processor']}, torch {data['versions']['torch']}.",
        "",
        *_stale(data["rows"]),
    ]
    dense = [cell for cell in found if cell.method == "dense"]
    groups = dict.fromkeys((cell.block, cell.sparsity) for cell in found if cell.block)
    if settings["variants"]:
        return lines + _variants(found, settings)
    for block, sparsity in sorted(groups, key=lambda key: (key[1], BlockSize.parse(key[0]).area)):
        here = [cell for cell in found if (cell.block, cell.sparsity) == (block, sparsity)]
        here.sort(key=lambda cell: settings["methods"].index(cell.method))
        lines += [f"### {100 * sparsity:g}% zeros, {BlockSize.parse(block)} blocks", ""]
        seeds = max(len(cell.rows) for cell in here)
        expected = sum(has_cell(method, block) for method in settings["methods"])
        missing = expected * seeds - sum(min(len(cell.rows), seeds) for cell in [*dense, *here])
        if missing:
            lines += [f"Not finished: {missing} trainings are missing.", ""]
            continue
        lines += [*_comparison([*dense, *here], settings), "", *_sizes(here)]
    return lines + _trials(data)


def _sizes_of(settings: dict[str, Any]) -> str:
    """The sizes of a model that has some to choose."""
    if settings["widths"]:
        return f" {'-'.join(map(str, settings['widths']))}"
    sizes = [f"{name} {settings['base'][name]}" for name in (*DecoderSize._fields, "patch") if name in settings["base"]]
    return f" ({', '.join(sizes)})" if sizes else ""


def _length(settings: dict[str, Any]) -> str:
    steps = settings["base"].get("steps")
    return f"{settings['epochs']} epochs" if steps is None else f"{steps:,} steps"


def _variants(found: Sequence[CellResult], settings: dict[str, Any]) -> list[str]:
    """The paired difference of every variant to the first one, for each block size."""
    measure = found[0].measure
    base = words(settings["base"])
    lines = [
        f"Variants of {', '.join(settings['methods'])}. Differences of **validation** {measure.name}, in {measure.difference}, "
        "are paired, to the first row; training multiply-adds are relative to it, too. In common: "
        f"{base}.",
        "",
    ]
    places = sorted({(cell.block, cell.sparsity) for cell in found}, key=lambda place: (place[1], BlockSize.parse(place[0]).area))
    columns = ["changed"]
    for block, sparsity in places:
        columns += [f"{BlockSize.parse(block)}, {100 * sparsity:g}%", "multiply-adds"]
    rows = []
    for number, variant in enumerate(settings["variants"]):
        row = [variant]
        for place in places:
            here = {cell.trial: cell for cell in found if (cell.block, cell.sparsity) == place}
            own, first = here.get(number), here.get(0)
            if own is None or first is None:
                row += ["", ""]
                continue
            row.append(own.spread_of("validation") if number == 0 else str(own.against(first, "validation")))
            row.append(f"{own.mean('training_macs') / first.mean('training_macs'):.2f}")
        rows.append(row)
    return [*lines, *table(columns, rows), ""]


def _stale(rows: Sequence[Row]) -> list[str]:
    """What is of an earlier revision of a method."""
    names = ", ".join(f"`{method}`" for method in stale(rows))
    return [f"Not run again yet since the method changed (see the changelog): {names}.", ""] if names else []


def _comparison(here: Sequence[CellResult], settings: dict[str, Any]) -> list[str]:
    ours = next((cell for cell in here if cell.method == OURS), None)
    sparse = [cell for cell in here if cell.block]
    measure = here[0].measure
    best = min(sparse, key=lambda cell: measure.badness(cell.quality))
    published = any((settings["model"], cell.method) in PUBLISHED for cell in here)
    title = "test accuracy %" if measure is ACCURACY else measure.title.lower()
    columns = ["method", title, f"{OURS} minus it", "zeros %", "parameters, most", "at the end"]
    columns += ["training multiply-adds", "inference multiply-adds", "bytes"]
    columns += ["published % (zeros)"] if published else []
    lines = []
    for cell in here:
        name = f"**{cell.method}**" if cell is best else cell.method
        difference = "" if ours is None or cell is ours else str(ours.against(cell))
        line = [
            name,
            cell.spread_of(),
            difference,
            f"{100 * cell.mean('block_sparsity'):.2f}",
            f"{cell.to_dense('trainable_parameters_max'):.2f}",
            f"{cell.to_dense('trainable_parameters_end'):.2f}",
            f"{cell.to_dense('training_macs'):.2f}",
            _ratio(cell.to_dense("inference_macs_per_sample")),
            f"{cell.to_dense(*BYTES):.2f}",
        ]
        if published:
            line.append(str(PUBLISHED.get((settings["model"], cell.method)) or ""))
        lines.append(line)
    footnotes = ["", FOOTNOTE] if published else []
    if any(row["inference_macs_per_sample"] is None for cell in here for row in cell.rows):
        footnotes += ["", "Inference multiply-adds that were counted in an earlier way are left out."]
    return table(columns, lines) + footnotes


def _ratio(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}"


def _sizes(here: Iterable[CellResult]) -> list[str]:
    """The block sizes that layers really had, where one does not divide."""
    sizes = {cell.rows[0]["blocks"] for cell in here}
    return [f"Effective block sizes: {', '.join(sorted(sizes))}.", ""] if any(" " in each for each in sizes) else []


def _trials(data: dict[str, Any]) -> list[str]:
    """Which trial was chosen for each method and block size, and of how many."""
    chosen: dict[tuple[str, str], str] = {}
    tried: dict[tuple[str, str], set[int]] = {}
    for row in data["rows"]:
        place = (row["block"], row["method"])
        if row["part"] == "compare":
            chosen[place] = row["settings"]
        else:
            tried.setdefault(place, set()).add(row["trial"])
    settings, methods = data["settings"], data["settings"]["methods"]
    if not tried:
        texts = {method: text for (_, method), text in chosen.items()}
        chosen_as = "; ".join(f"{method} {texts[method]}" for method in methods if method in texts)
        return [f"Settings, not tuned in this study: {chosen_as}.", ""]
    lines = []
    for block, method in sorted(chosen, key=lambda key: (BlockSize.parse(key[0]).area if key[0] else 0, methods.index(key[1]))):
        trials = tried.get((settings["tuned_as"].get(block, block), method), ())
        lines.append([method, str(BlockSize.parse(block)) if block else "", chosen[block, method], str(len(trials))])
    seeds = len({row["seed"] for row in data["rows"] if row["part"] == "tune"})
    title = f"### Settings chosen on validation, {count(seeds, 'seed')} a trial"
    where = f"Tried at {100 * settings['tuned_at']:g}% zeros, and taken for the other sparsities too."
    borrowed = ", ".join(f"{block}x{block} those of {other}x{other}" for block, other in settings["tuned_as"].items())
    taken = f" Not tried but taken from another size: {borrowed}." if borrowed else ""
    small = (
        " A rank above the block's area counts as that area." if any(BlockSize.parse(b).area < 8 for b, _ in chosen if b) else ""
    )
    return [title, "", where + taken + small, "", *table(["method", "block", "settings", "trials"], lines, left=3), ""]
