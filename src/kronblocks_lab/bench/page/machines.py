"""Parts of the page with one column for each kind of machine: precisions, convolutions, and where a step's time goes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from kronblocks.core.blocks import BlockSize
from kronblocks_lab.bench.account import STEP
from kronblocks_lab.bench.cases.ways import DENSE
from kronblocks_lab.bench.convolutions import ConvShape
from kronblocks_lab.bench.measure.results import read
from kronblocks_lab.bench.page.tables import Row, blocks_of, count, find, ms, ratio, table, where
from kronblocks_lab.bench.precision import PACKED

Files = dict[str, dict[str, Any]]


def machine_of(data: dict[str, Any]) -> str:
    """The kind of machine that a file was measured on, as a column is called."""
    machine = data.get("machine", {})
    held = ", held to it" if machine.get("held") else ""
    return f"{machine.get('kind', 'kind not recorded')}{held}"


def files_of(folder: Path, kind: str) -> Files:
    """All files of a benchmark by the names of their columns, that without a label first."""
    found: Files = {}
    for path in sorted(folder.glob(f"bench-{kind}*.json"), key=lambda path: path.stem):
        data = read(path)
        name, label = machine_of(data), data["settings"].get("label")
        found[f"{name}, {label}" if name in found and label else name] = data
    return found


def _measured(files: Files) -> list[str]:
    """Each machine with its speeds, a line each."""
    lines = []
    for name, data in files.items():
        machine = data["machine"]
        rates = f"a dense fp32 product ({machine['product']}) at {machine['product_gflops']:g} GFLOP/s"
        lines.append(f"- {name}: {where(data)} In the same run {rates}, copies at up to {max(machine['copy_gb_per_s']):g} GB/s.")
    return [*lines, ""]


def _places(files: Files, *names: str) -> list[tuple[Any, ...]]:
    """Where any machine has a row, in the order of the first that has it."""
    rows = (row for data in files.values() for row in data["rows"])
    return list(dict.fromkeys(tuple(row[name] for name in names) for row in rows))


def _cell(rows: Iterable[Row]) -> str:
    """A ratio with its range, bold where we win; nothing where it was not measured."""
    for row in rows:
        text = f"{ratio(row['speed'])} ({ratio(row['speed_low'])} to {ratio(row['speed_high'])})"
        return f"**{text}**" if row["speed"] >= 1 else text
    return ""


def precision_part(files: Files) -> list[str]:
    """Packed layers in fp32, bf16 and int8: a line for each, a column for each machine."""
    density = next(iter(files.values()))["settings"]["density"]
    text = [
        "## One layer in fp32, bf16 and int8",
        "",
        f"Packed, {100 * (1 - density):g}% zeros. Each ratio is to the dense layer of the same precision: "
        "dense fp32, dense bf16, or torch's dynamic int8. Forward is under `torch.inference_mode`. "
        "In int8 both sides quantise their inputs in every call.",
        "",
        *_measured(files),
    ]
    names = ("shape", "direction", "rows", "block", "precision")
    places = [place for place in _places(files, *names, "case") if place[-1] == PACKED]
    for shape in dict.fromkeys(place[0] for place in places):
        lines = []
        blocks = blocks_of([{"block": place[3]} for place in places])
        here = [place[:-1] for place in places if place[0] == shape]
        order = {name: number for number, name in enumerate(dict.fromkeys(place[1] for place in here))}
        for place in sorted(here, key=lambda each: (order[each[1]], each[2], blocks.index(each[3]))):
            wanted = dict(zip(names, place, strict=True))
            cells = [_cell(find(data["rows"], **wanted, case=PACKED)) for data in files.values()]
            lines.append([place[1], f"{place[2]:,}", place[3], f"dense {place[4]}", *cells])
        text += [f"### {shape}: three precisions", "", *table(["", "rows", "block", "beside", *files], lines, left=4), ""]
    return text


def conv_part(files: Files) -> list[str]:
    """Convolutions in plan "auto", a column for each machine."""
    settings = next(iter(files.values()))["settings"]
    names, lines = ("shape", "density", "direction", "case"), []
    for shape, density, direction, case in _places(files, *names):
        if case == DENSE:
            continue
        cells = []
        for data in files.values():
            rows = find(data["rows"], shape=shape, density=density, direction=direction, case=case)
            cells.append(f"{_cell(rows)} {rows[0]['plan']}" if rows else "")
        lines.append([str(ConvShape.parse(shape)), f"{density:g}", direction, case, *cells])
    return [
        "## Convolutions",
        "",
        f"{count(settings['images'], 'image')}, as many channels out as in, {BlockSize.parse(settings['block_size'])} blocks, "
        'beside torch\'s own convolution in fp32. Plan "auto" chose by timings; its choice follows the ratio.',
        "",
        *_measured(files),
        *table(["convolution", "density", "", "layer", *(f"{name}, to dense fp32" for name in files)], lines, left=4),
        "",
    ]


def account_part(files: Files) -> list[str]:
    """Where a training step's time goes, three columns for each machine."""
    settings = next(iter(files.values()))["settings"]
    sizes, lines = "-".join(map(str, settings["widths"])), []
    places = _places(files, "phase", "part")
    for phase in dict.fromkeys(place[0] for place in places):
        for part in (part for each, part in places if each == phase):
            cells = [cell for data in files.values() for cell in _share(data["rows"], phase, part)]
            lines.append([f"**{phase}**" if part == STEP else part, *cells])
    columns = [text for name in files for text in (f"{name}, ms", "of the step", "of its bound")]
    return [
        "## Where a step's time goes",
        "",
        f"MLP {sizes}, {count(settings['rows'], 'row')} a step, fused Adam, {BlockSize.parse(settings['block_size'])} blocks, "
        f"{100 * settings['sparsity']:g}% zeros at the end. Each phase of `two-phase` was timed in turns with dense fp32. "
        "Parts come from torch's profiler, whose own time counts in them. The bound of a product is its multiply-adds at the "
        "speed of a dense product; that of the optimizer is its bytes at the speed of a copy.",
        "",
        *_measured(files),
        *table(["phase, or part", *columns], lines),
        "",
    ]


def _share(rows: Sequence[Row], phase: str, part: str) -> list[str]:
    """Milliseconds, share of the step (of dense's step for a whole one), and how near to the bound."""
    for row in find(rows, phase=phase, part=part):
        reached = "" if row["bound_ms"] is None else f"{100 * row['bound_ms'] / row['ms']:.0f}%"
        share = f"{100 * row['share']:.0f}%"
        if part == STEP:
            share = f"{ratio(row['ms'] / find(rows, phase=DENSE, part=STEP)[0]['ms'])} of dense fp32"
        return [ms(row["ms"]), share, reached]
    return ["", "", ""]
