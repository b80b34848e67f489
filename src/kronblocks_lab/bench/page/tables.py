"""Markdown tables from rows of results: a ratio above 1 is faster than dense, and the fastest of a comparison is bold."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from kronblocks_lab.bench.cases.ways import BOTH, DENSE, FASTKRON, FORWARD, PEERS
from kronblocks_lab.bench.deploy import INT8

Row = dict[str, Any]
OTHERS = (*PEERS, FASTKRON)
SHORT = {"tile_first": "tile", "coeff_first": "coeff", "packed": "packed", "dense": "build"}


def table(columns: Sequence[str], lines: Iterable[Sequence[str]], *, left: int = 1) -> list[str]:
    """A table whose first columns are text and whose others are numbers."""
    rule = ["---" if number < left else "---:" for number in range(len(columns))]
    return [f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |" for cells in (columns, rule, *lines)]


def fill(text: str, name: str, lines: Sequence[str]) -> str:
    """The page with a table put between its markers."""
    begin, end = f"<!-- begin table: {name} -->", f"<!-- end table: {name} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"there is no place for the table {name!r}: write {begin} and {end} where it belongs")
    return pattern.sub(lambda _: "\n".join([begin, "", *lines, "", end]), text)


def kept(page: Path, title: str, command: str) -> str:
    """The page as it is, whose prose is written by hand between its tables; or a new one with nothing but a title."""
    if page.exists():
        return page.read_text(encoding="utf-8")
    return f"# {title}\n\n<!-- between markers: written by `{command}`; the rest is yours -->\n"


def fill_or_add(text: str, name: str, lines: Sequence[str], title: str) -> str:
    """The page with a table between its markers; where there are none, in a section of its own at the end."""
    if f"<!-- begin table: {name} -->" not in text:
        text += f"\n## {title}\n\n<!-- begin table: {name} -->\n<!-- end table: {name} -->\n"
    return fill(text, name, lines)


def ratio(value: float) -> str:
    """Two or three digits."""
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def count(number: int, noun: str) -> str:
    """A number with its noun.

    >>> count(1, "row"), count(2048, "row")
    ('1 row', '2,048 rows')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def ms(value: float) -> str:
    """Milliseconds with three digits."""
    return (
        f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"
    )


def spread(row: Row) -> str:
    """Ratio to dense with the range of the repeats."""
    return f"{ratio(row['speed'])} ({ratio(row['speed_low'])} to {ratio(row['speed_high'])})"


def limit_of(row: Row) -> str:
    """What multiply-adds and bytes allow at best."""
    return ratio(min(row["macs_bound"], row["bytes_bound"]))


def roof(row: Row) -> str:
    """The same of a step, where it was counted."""
    return "" if row.get("macs_bound") is None else limit_of(row)


def find(rows: Iterable[Row], /, **wanted: Any) -> list[Row]:
    """Rows with these values."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def group(rows: Iterable[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by the values that they have under these names."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def is_ours(row: Row) -> bool:
    """A layer of this library in a fixed plan."""
    return row["case"].startswith(("values ", "factors ")) and not row["case"].endswith(" auto")


def _name(row: Row) -> str:
    return row["case"].removeprefix("torch ").replace("two products", "2 products")


def versus(ours: Sequence[Row], others: Sequence[Row], *, say_plan: bool = False) -> str:
    """Our fastest against the fastest of the others and dense: only the winner is bold."""
    if not ours:
        return ""
    best = max(ours, key=lambda row: row["speed"])
    own = ratio(best["speed"]) + (f" {SHORT.get(best['plan'], best['plan'])}" if say_plan else "")
    rival = max(others, key=lambda row: row["speed"], default=None)
    if rival is not None and rival["speed"] > max(1.0, best["speed"]):
        return f"{own}; **{_name(rival)} {ratio(rival['speed'])}**"
    return f"**{own}**" if best["speed"] >= 1 else f"{own}; **{DENSE}**"


def _columns(rows: Sequence[Row]) -> list[tuple[str, int]]:
    """Direction and rows of the columns of a table."""
    counts = sorted({row["rows"] for row in rows})
    return [(way, number) for way in (FORWARD, BOTH) for number in counts if find(rows, direction=way, rows=number)]


def _headings(columns: Sequence[tuple[str, int]]) -> list[str]:
    return [f"{'fwd+bwd' if direction == BOTH else direction}, {count(number, 'row')}" for direction, number in columns]


def blocks_of(rows: Sequence[Row]) -> list[str]:
    """Block sizes by area, then by rows."""

    def sides(block: str) -> tuple[int, int]:
        height, width = map(int, block.split("x"))
        return height * width, height

    return sorted({row["block"] for row in rows}, key=sides)


def dense_of(settings: dict[str, Any]) -> str:
    """What the ratios of a file are to.

    >>> dense_of({"dtype": "bfloat16"})
    'dense bf16'
    """
    short = {"float32": "fp32", "bfloat16": "bf16"}
    precision = settings.get("dtype", "float32")
    return f"dense {short.get(precision, precision)}"


def where(data: dict[str, Any]) -> str:
    """The machine and the settings of a file, in a sentence."""
    versions, settings = data["versions"], data["settings"]
    machine = data.get("machine", {})
    held = ", to which the processor was held" if machine.get("held") else ""
    kind = f" ({machine['kind']}{held})" if machine.get("kind") else ""
    device = "" if settings.get("device", "cpu") == "cpu" else f", device {settings['device']}"
    precision = settings.get("dtype", "float32")
    dtype = "" if precision == "float32" else f", {precision}"
    recorded = ", every case a CUDA graph" if settings.get("graphs") else ""
    quick = " **A quick run: too short for conclusions.**" if settings["quick"] else ""
    threads = count(settings["threads"], "thread")
    used = f"torch {versions['torch']}, kronblocks {versions['kronblocks']}"
    return f"{versions['processor']}{kind}, {threads}{device}{dtype}{recorded}, {used}.{quick}"


def ratios_of(data: dict[str, Any]) -> str:
    """The same, and what its ratios are to."""
    return f"{where(data)} Ratios are to {dense_of(data['settings'])}."


def step_tables(data: dict[str, Any]) -> list[str]:
    """Training steps of all models, a table for each batch size."""
    text, rows = [], data["rows"]
    for number in sorted({row["rows"] for row in rows}):
        here = find(rows, rows=number)
        dense, lines = find(here, case=DENSE)[0], []
        fastest, counted = max(row["speed"] for row in here), any(map(roof, here))
        for row in here:
            time = ms(row["ms"])
            memory = losses = ""
            if row["peak_bytes"] is not None:
                memory = f"{row['peak_bytes'] / 2**20:.0f} MiB, {ratio(row['peak_bytes'] / dense['peak_bytes'])}"
                losses = f"{row['first_loss']:.3f} to {row['last_loss']:.3f}"
            name = f"{row['case']} ({row['plan']})" if "auto" in row["case"] else row["case"]
            share = ratio(row["parameters"] / dense["parameters"])
            time = f"**{time}**" if row["speed"] == fastest else time
            lines.append([name, time, spread(row), *([roof(row)] if counted else []), share, memory, losses])
        columns = ["model", "ms", f"ratio to {dense_of(data['settings'])}", *(["roof"] if counted else [])]
        columns += ["parameters to dense", "peak memory, to dense", "loss"]
        text += [f"### A training step, {count(number, 'row')}", "", *table(columns, lines), ""]
    return text


def compiled_dense(rows: Sequence[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Dense under torch.compile, where it was timed, by block, density, direction and rows."""
    return group(find(rows, case=f"{DENSE}, compiled"), "block", "density", "direction", "rows")


def values_table(rows: Sequence[Row]) -> list[str]:
    """Free values on the live blocks, one shape: the packed plan against dense and other libraries."""
    wanted = [row for row in rows if row["case"] == "values packed" or row["case"] in OTHERS[: len(PEERS)]]
    columns, lines, places = _columns(wanted), [], group(wanted, "block", "density", "direction", "rows")
    compiled = compiled_dense(rows)
    for block in blocks_of(wanted):
        for density in sorted({row["density"] for row in find(wanted, block=block)}):
            keys = [(block, density, *column) for column in columns]
            here = [[*places.get(key, []), *compiled.get(key, [])] for key in keys]
            cells = [versus([row for row in rows if is_ours(row)], [row for row in rows if not is_ours(row)]) for rows in here]
            lines.append([block, f"{density:g}", *cells])
    return table(["block", "density", *_headings(columns)], lines, left=2)


def factors_table(rows: Sequence[Row]) -> list[str]:
    """Factors, one shape: the best fixed plan against dense, pyfastkron and the layer as the paper's authors write it."""
    ours = [row for row in rows if is_ours(row) and row["rank"] is not None]
    others = [row for row in rows if row["case"].startswith("authors ") or row["case"] == FASTKRON]
    columns, lines = _columns(ours), []
    names = ("block", "rank", "density", "direction", "rows")
    own, rivals, compiled = group(ours, *names, "tile_groups"), group(others, *names), compiled_dense(rows)
    for block in blocks_of(ours):
        for rank, banks, density in sorted({(r["rank"], r["tile_groups"], r["density"]) for r in find(ours, block=block)}):
            keys = [(block, rank, density, *column) for column in columns]
            against = [[*(rivals.get(key, []) if banks == "1" else []), *compiled.get((key[0], *key[2:]), [])] for key in keys]
            mine = [own.get((*key, banks), []) for key in keys]
            cells = [versus(*pair, say_plan=True) for pair in zip(mine, against, strict=True)]
            lines.append([block, str(rank), banks, f"{density:g}", *cells])
    return table(["block", "rank", "tile banks", "density", *_headings(columns)], lines, left=4)


def inference_table(rows: Sequence[Row]) -> list[str]:
    """Inference, one shape: packed against dense and other libraries, and the best plan of the factored layer."""
    counts, lines = sorted({row["rows"] for row in rows}), []
    for block in blocks_of(rows):
        for density in sorted({row["density"] for row in find(rows, block=block)}):
            cells = []
            for number in counts:
                here = find(rows, block=block, density=density, rows=number)
                rivals = [row for row in here if row["case"] in OTHERS]
                factors = [row for row in here if is_ours(row) and row["rank"] is not None]
                cells += [versus(find(here, case="values packed"), rivals), versus(factors, [], say_plan=True)]
            lines.append([block, f"{density:g}", *cells])
    headings = [text for number in counts for text in (f"packed, {count(number, 'row')}", "factors")]
    return table(["block", "density", *headings], lines, left=2)


def auto_table(rows: Sequence[Row], direction: str, least_rows: int) -> list[str]:
    """How good the choices of "auto" are: per kind of layer, against the best fixed plan of the same run.

    In inference (forward alone) a finished layer may also become dense, and factors packed values: these count as plans.
    """
    lines, place = [], ("shape", "block", "density", "rows", "direction")
    places = group((row for row in rows if is_ours(row)), *place)
    autos = [row for row in rows if row["case"].endswith(" auto") and row["rows"] >= least_rows and row["direction"] == direction]
    for name in dict.fromkeys(row["case"] for row in autos):
        family, pairs = name.removesuffix("auto"), []
        for auto in find(autos, case=name):
            here = places[tuple(auto[key] for key in place)]
            fixed = [row for row in here if row["case"] == f"{family}{row['plan']}"]
            speeds = [row["speed"] for row in [*fixed, auto]]
            if direction == FORWARD:
                speeds += [1.0, *(row["speed"] for row in find(here, case="values packed"))]
            pairs.append((auto, max(speeds)))
        near = sum(auto["speed"] >= best / 1.1 for auto, best in pairs)
        slow = sum(auto["speed"] < 0.97 <= best for auto, best in pairs)
        worst, best = min(pairs, key=lambda pair: pair[0]["speed"] / pair[1])
        where = f"{worst['shape']}, {worst['block']}, density {worst['density']:g}, {count(worst['rows'], 'row')}"
        found = f"{worst['plan'] or DENSE} {ratio(worst['speed'])}, best {ratio(best)}: {where}"
        least = min(auto["speed"] for auto, _ in pairs)
        lines.append([family.strip(), str(len(pairs)), f"{100 * near / len(pairs):.0f}%", str(slow), ratio(least), found])
    missed = "below 0.97 of dense, where a plan is not"
    return table(["layer", "cases", "within 10% of the best plan", missed, "least ratio", "farthest from the best"], lines)


def deployed_about(settings: dict[str, Any]) -> list[str]:
    """What was exported, and beside what it stands."""
    text = (
        f"MLP of {count(settings['layers'], 'layer')} of {settings['width']}x{settings['width']}, ReLU between, and a dense one "
        "of 10 outputs. `export` chose the forms. Live blocks are at random places. "
        "Everything runs under `torch.inference_mode`. Dense int8 is PyTorch's dynamic quantisation of the dense model: no "
        "zeros needed, but other outputs, as for all int8 models."
    )
    return [text, ""]


def deployed_table(rows: Sequence[Row]) -> list[str]:
    """Whole exported models."""
    dense, lines = {row["rows"]: row for row in rows if row["case"] == DENSE}, []
    int8 = {row["rows"]: row for row in rows if row["case"] == INT8}
    for row in rows:
        forms = f" ({row['forms']})" if row["forms"] else ""
        size = ratio(row["bytes"] / dense[row["rows"]]["bytes"])
        small = ratio(int8[row["rows"]]["ms"] / row["ms"]) if row["rows"] in int8 else ""
        lines.append(
            [f"{row['rows']:,}", f"{row['case']}{forms}", ms(row["ms"]), spread(row), small, size, f"{row['error']:.0e}"]
        )
    columns = ["rows", "model", "ms", "ratio to dense fp32", "to dense int8", "bytes to dense fp32", "largest error, to float64"]
    return table(columns, lines)
