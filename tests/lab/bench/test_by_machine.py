"""Precisions, convolutions and the account: what the commands write, and the page's columns, one for each kind of machine."""

from __future__ import annotations

import copy
import json
import re

import pytest

from kronblocks.core.errors import KronblocksError
from kronblocks_lab.__main__ import main
from kronblocks_lab.bench import precision
from kronblocks_lab.bench.convolutions import ConvSettings, ConvShape
from kronblocks_lab.bench.measure.results import read
from kronblocks_lab.bench.precision import PrecisionSettings

TINY = "--quick --threads 1 --seconds 1e-4 --repeats 2"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The files of both benchmarks."""
    folder = tmp_path_factory.mktemp("results")
    for line in (
        f"precision {TINY} --shapes 64x128 --blocks 8 16x32 --rows 1 16",
        f"conv {TINY} --shapes 16x6x3 16x6x3/2 --images 2 --block-size 8 --densities 0.5",
    ):
        main(["bench", *line.split(), "--out", str(folder)])
    return folder


def test_each_precision_is_timed_beside_its_own_dense(results):
    rows = read(results / "bench-precision.json")["rows"]
    places = {(row["block"], row["rows"], row["direction"], row["precision"]) for row in rows}
    forward = {
        (block, count, "forward", p) for block in ("", "8x8", "16x32") for count in (1, 16) for p in ("fp32", "bf16", "int8")
    }
    both = {(block, 16, "forward+backward", p) for block in ("", "8x8", "16x32") for p in ("fp32", "bf16")}
    assert places == forward | both and len(rows) == len(places)
    for row in rows:
        dense = [each for each in rows if each["block"] == "" and all(each[k] == row[k] for k in ("rows", "direction"))]
        own, fp32 = (next(each["ms"] for each in dense if each["precision"] == p) for p in (row["precision"], "fp32"))
        assert row["speed"] == pytest.approx(own / row["ms"], rel=2e-3)
        assert row["fp32_speed"] == pytest.approx(fp32 / row["ms"], rel=2e-3)


def test_a_wrong_int8_product_is_not_timed(tmp_path, monkeypatch):
    made = precision.QuantizedBlockLinear.from_packed

    def wrong(layer):
        quantised = made(layer)
        quantised.scales.mul_(1.2)
        return quantised

    monkeypatch.setattr(precision.QuantizedBlockLinear, "from_packed", wrong)
    settings = PrecisionSettings(out=tmp_path, quick=True, threads=1, seconds=1e-4, shapes=("64x64",), blocks=("8",), rows=(2,))
    with pytest.raises(KronblocksError, match="packed 8x8 int8: outputs are wrong"):
        precision.measure_rows(settings, "64x64", 2, lambda text: None)


def test_convolutions_are_timed_beside_torchs(results):
    rows = read(results / "bench-conv.json")["rows"]
    assert {(row["shape"], row["direction"], row["case"]) for row in rows} == {
        (shape, direction, case)
        for shape in ("16x6x3", "16x6x3/2")
        for direction in ("forward", "forward+backward")
        for case in ("dense", "live blocks", "factors")
    }
    assert all((row["plan"] is None) == (row["case"] == "dense") for row in rows)
    assert all(row["speed"] == pytest.approx(row["dense_ms"] / row["ms"], rel=2e-3) for row in rows)


def test_shapes_of_convolutions():
    assert ConvShape.parse("256x14x3") == (256, 14, 3, 1) and ConvShape.parse("8x5x1/2") == (8, 5, 1, 2)
    assert str(ConvShape.parse("8x5x1/2")) == "8 channels, 5x5, kernel 1x1, stride 2"


@pytest.mark.parametrize(
    ("settings", "wrong", "says"),
    [
        (PrecisionSettings, {"dtype": "bf16"}, "use bench ops"),
        (PrecisionSettings, {"density": 0.0}, "--density"),
        (PrecisionSettings, {"rows": (0,)}, "--rows"),
        (PrecisionSettings, {"blocks": ("7",)}, "divide"),
        (ConvSettings, {"dtype": "bf16"}, "in fp32"),
        (ConvSettings, {"densities": (2.0,)}, "--densities"),
        (ConvSettings, {"images": 0}, "--images"),
        (ConvSettings, {"shapes": ("256x14",)}, "such as 256x14x3"),
        (ConvSettings, {"block_size": "7"}, "choose another --block-size"),
    ],
)
def test_settings_that_cannot_be(settings, wrong, says):
    with pytest.raises(KronblocksError, match=says):
        settings(**wrong)


def made_up(data: dict, kind: str, faster: float, *, held: bool = False) -> dict:
    """The same measurements on a machine where everything is so many times as fast, beside dense."""
    found = copy.deepcopy(data)
    columns = found["columns"]
    for row in found["rows"]:
        for name in ("speed", "speed_low", "speed_high"):
            row[columns.index(name)] *= faster
    found["machine"] |= {"kind": kind} | ({"held": True} if held else {})
    return found


def test_each_kind_of_machine_has_a_column_and_the_summary_the_lowest(results, tmp_path):
    for kind in ("precision", "conv"):
        data = json.loads((results / f"bench-{kind}.json").read_text())
        place, shape = data["columns"].index("speed"), data["columns"].index("shape")
        for row in data["rows"]:
            row[place : place + 3], row[shape] = [3.0, 2.5, 3.5], row[shape].replace("64x128", "1024x1024")
            row[:] = ["16x16" if each == "16x32" else each for each in row]
            if kind == "conv":
                row[data["columns"].index("density")] = 0.1
        (tmp_path / f"bench-{kind}.json").write_text(json.dumps(made_up(data, "AVX512", 1)))
        slow = made_up(data, "AVX2", 0.25, held=True)
        slow["settings"]["label"] = "AVX2"
        (tmp_path / f"bench-{kind}-AVX2.json").write_text(json.dumps(slow))
        again = made_up(data, "AVX512", 2)
        again["settings"]["label"] = "other"
        (tmp_path / f"bench-{kind}-other.json").write_text(json.dumps(again))
    page = tmp_path / "benchmarks.md"
    main(["bench", "tables", "--results", str(tmp_path), "--page", str(page)])
    text = page.read_text()
    names = "AVX512 | AVX2, held to it | AVX512, other |"
    assert f"| beside | {names}" in text
    cells = "**3.00 (2.50 to 3.50)** | 0.75 (0.62 to 0.88) | **6.00 (5.00 to 7.00)** |"
    assert f"| forward | 16 | 16x16 | dense int8 | {cells}" in text
    assert f"| forward+backward | 16 | 8x8 | dense bf16 | {cells}" in text
    (line,) = re.findall(r"^\| 16 channels, 6x6, kernel 3x3, stride 2 \| 0.1 \| forward \| live blocks .*$", text, re.MULTILINE)
    assert re.sub(r" (packed|dense) \|", " |", line).endswith(cells)
    summary = text.partition("## Summary")[2].partition("\n## ")[0]
    assert "| what | beside | lowest | AVX2, held to it | AVX512 | limit |" in summary
    rows = [line for line in summary.splitlines() if "dense int8" in line or "convolution" in line]
    assert rows and all("| 0.75 | 0.75 | 3.00 to 6.00 |" in line for line in rows)
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert all(len({line.count(" | ") for line in table.splitlines()}) == 1 for table in tables)


def test_accounts_of_several_machines_stand_side_by_side(tmp_path):
    rows = [["dense", "whole step", 10.0, 1.0, None, None, 9], ["dense", "optimizer", 2.0, 0.2, 1.0, "bytes", 1]]
    machine = {"product": "8 rows, 8x8", "product_gflops": 7, "copy_mib": [1], "copy_gb_per_s": [5.0], "kind": "AVX512"}
    data = {
        "version": 1,
        "kind": "account",
        "settings": {"widths": [8, 8], "rows": 4, "block_size": "4", "sparsity": 0.9, "threads": 1, "quick": False},
        "versions": {"processor": "a processor", "torch": "2", "kronblocks": "0"},
        "machine": machine,
        "columns": ["phase", "part", "ms", "share", "bound_ms", "bound", "calls"],
        "rows": rows,
    }
    (tmp_path / "bench-account.json").write_text(json.dumps(data))
    heal = ["heal", "whole step", 5.0, 1.0, None, None, 9]
    other = {**data, "settings": {**data["settings"], "label": "AVX2"}, "machine": {**machine, "kind": "AVX2"}}
    (tmp_path / "bench-account-AVX2.json").write_text(json.dumps({**other, "rows": [*rows, heal]}))
    page = tmp_path / "benchmarks.md"
    main(["bench", "tables", "--results", str(tmp_path), "--page", str(page)])
    text = page.read_text()
    assert "| phase, or part | AVX512, ms | of the step | of its bound | AVX2, ms | of the step | of its bound |" in text
    assert "| optimizer | 2.00 | 20% | 50% | 2.00 | 20% | 50% |" in text
    assert "| **heal** |  |  |  | 5.00 | 0.50 of dense fp32 |  |" in text
