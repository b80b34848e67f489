"""`kronblocks bench --device cuda` on tiny sizes: CUDA graphs, precisions, peak memory, whole models. `make test-gpu`."""

from __future__ import annotations

import os

import pytest
import torch

from kronblocks_lab.__main__ import main
from kronblocks_lab.bench.measure.graphs import graphed
from kronblocks_lab.bench.measure.results import read

if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs an NVIDIA GPU: make test-gpu", allow_module_level=True)

TINY = "--device cuda --seconds 1e-3 --repeats 2"


def test_a_replay_computes_anew():
    x, weight = torch.ones(64, 64, device="cuda"), torch.full((64, 64), 2.0, device="cuda")
    replay = graphed(lambda: x @ weight)
    assert float(replay()[0, 0]) == 128
    x.fill_(3)
    assert float(replay()[0, 0]) == 384


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("graphs", [False, True])
def test_authors_and_large_layers(precision, graphs, tmp_path):
    ways = f"--dtype {precision} --out {tmp_path}{' --graphs' * graphs}"
    main(["bench", *f"step {TINY} --authors --rows 256 --cases 8x8 {ways} --loss-steps 3".split()])
    main(["bench", *f"ops {TINY} --large --shapes 512x512 --blocks 64 --rows 256 --densities 0.25 1 {ways}".split()])
    files = [read(path) for path in sorted(tmp_path.glob("bench-*.json"))]
    assert len(files) == 2 and all(data["machine"]["backend"].startswith("triton") for data in files)
    layers, steps = files
    assert {"values packed", "factors r=4 coeff_first", "torch BSR F.linear"} <= {row["case"] for row in layers["rows"]}
    assert all(row["peak_bytes"] > 0 for row in (*layers["rows"], *steps["rows"]))
    assert all(row["last_loss"] < row["first_loss"] for row in steps["rows"])


def test_a_whole_model(tmp_path):
    main(["bench", *f"model {TINY} --image-size 32 --batch-size 8 --dtype bf16 --out {tmp_path}".split()])
    rows = read(tmp_path / "bench-model-vit-tiny-cuda-bf16.json")["rows"]
    assert [row["direction"] for row in rows] == ["training step"] * 3 + ["inference"] * 2
