"""The grid of exported models, at tiny sizes: what it writes, that it goes on where it was, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from kronblocks import KronblocksError
from kronblocks_lab.bench import exports
from kronblocks_lab.bench.exports import ExportsSettings

pytestmark = pytest.mark.slow


def test_the_grid_has_30_models():
    settings = ExportsSettings()
    assert len(settings.models) * len(settings.rows) * len(settings.precisions) == 30


def test_tiny_models(tmp_path, monkeypatch):
    monkeypatch.setenv("KRONBLOCKS_MEASURE", "on")
    tiny = {"quick": True, "threads": 1, "seconds": 1e-4, "repeats": 1, "search": 0.01, "rows": (2,), "out": tmp_path}
    for models, precisions in ((("mlp-4x4",), ("fp32",)), (("mlp-16x16", "convolutions", "decoder"), ("bf16",))):
        results = exports.run(ExportsSettings(models=models, precisions=precisions, **tiny))
    assert len(results.rows) == 4 * 3 and {row["case"] for row in results.rows} == {"as it was", "exported", "dense"}
    found = [row for row in results.rows if row["case"] == "exported"]
    assert all(row["timed"] >= 1 and row["forms"] and row["ms"] > 0 for row in found)
    assert all(row["speed"] == 1 for row in results.rows if row["case"] == "as it was")
    table = exports.summary(results)
    low: Any = exports.worst(results)
    assert table.row_count == 4 and f"worst {low['speed']:.2f}" in str(table.title)
    before = [dict(row) for row in results.rows]
    assert exports.run(ExportsSettings(models=("decoder",), precisions=("bf16",), **tiny)).rows == before


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"models": ("gan",)}, "'gan' is none of mlp-16x16"),
        ({"precisions": ("tf32",)}, "are fp32 and bf16 here"),
        ({"dtype": "bf16"}, "use --precisions"),
        ({"rows": (0,)}, "--rows are from 1 on"),
    ],
)
def test_settings_that_make_no_sense(settings, words):
    with pytest.raises(KronblocksError, match=words):
        ExportsSettings(**settings)
