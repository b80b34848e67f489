"""The report on made-up trainings: numbers, warnings exactly when due, and a page that needs nothing else."""

from __future__ import annotations

import copy
import json
import re
import statistics
from pathlib import Path

import pytest
import safetensors.torch
import torch

from kronblocks import KronblocksError
from kronblocks.experiments.report import find_runs, write_report

BASE = {
    "version": 1,
    "test_accuracy": 0.9,
    "test_loss": 0.3,
    "validation_accuracy": 0.9,
    "validation_loss": 0.3,
    "block_sparsity": 0.0,
    "live_blocks": 4,
    "total_blocks": 4,
    "train_seconds": 10.0,
    "peak_memory_bytes": 2**26,
    "peak_memory_exact": True,
    "bytes": {"parameters": 400, "gradients": 400, "optimizer_state": 800, "saved_tensors": 1000},
    "trainable_parameters_start": 100,
    "trainable_parameters_max": 100,
    "trainable_parameters_end": 100,
    "training_macs": 10**9,
    "inference_macs_per_sample": 1000,
    "layers": [
        {
            "name": "1",
            "kind": "Linear",
            "out_features": 32,
            "in_features": 32,
            "block_size": "16x16",
            "live_blocks": 4,
            "total_blocks": 4,
            "plan": "dense",
            "sparsity": 0.0,
        }
    ],
    "surgery": {"selected": [{"name": "1", "block_size": "16x16", "note": ""}], "left_dense": []},
    "structure": {},
    "history": [
        {
            "epoch": epoch,
            "step": 10 * epoch,
            "phase": "dense",
            "train_loss": 1.0 / epoch,
            "validation_loss": 1.0 / epoch,
            "validation_accuracy": 0.8 + epoch / 100,
            "block_sparsity": 0.0,
            "seconds": 5.0 * epoch,
            "training_macs": 5 * 10**8 * epoch,
            "trainable_parameters": 100,
        }
        for epoch in (1, 2)
    ],
    "config": {
        "data": "digits",
        "model": "mlp",
        "widths": [32],
        "block_size": "16",
        "rank": 4,
        "sparsity": 0.75,
        "epochs": 2,
        "batch_size": 64,
        "method": "dense",
        "seed": 0,
        "recipe": {"lr": 0.004, "weight_decay": 0.0, "factor_weight_decay": 0.0},
    },
    "threads": 2,
    "versions": {"kronblocks": "0.1.0", "torch": "2.13.0"},
}
SPARSE = {
    "test_accuracy": 0.91,
    "block_sparsity": 0.75,
    "live_blocks": 1,
    "training_macs": 5 * 10**8,
    "train_seconds": 6.0,
    "peak_memory_bytes": 2**25,
    "trainable_parameters_max": 40,
    "trainable_parameters_end": 30,
}


def put(folder: Path, method: str = "dense", seed: int = 0, **changes) -> Path:
    """Write a made-up training; `changes` go into the result."""
    result = copy.deepcopy(BASE)
    masks = {}
    if method != "dense":
        result |= SPARSE
        masks = {"1": torch.tensor([[1, 0], [0, 0]], dtype=torch.uint8)}
    result |= changes
    result["config"] |= {"method": method, "seed": seed}
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))
    safetensors.torch.save_file(masks, folder / "masks.safetensors")
    return folder


def pages(folder: Path) -> tuple[str, str]:
    path = write_report(find_runs([folder]), folder / "out")
    return path.read_text(), path.with_suffix(".md").read_text()


def warnings_of(markdown: str) -> str:
    """The report's part on what is worse than dense."""
    found = re.search(r"## Warnings\n(.*?)\n## ", markdown, re.DOTALL)
    return found[1] if found else ""


def test_means_and_sample_spreads_are_in_the_table(tmp_path):
    accuracies = [0.901, 0.917, 0.922]
    for seed, accuracy in enumerate(accuracies):
        put(tmp_path / f"d{seed}", seed=seed, test_accuracy=accuracy - 0.02)
        put(tmp_path / f"t{seed}", "two-phase", seed, test_accuracy=accuracy)
    _, markdown = pages(tmp_path)
    mean, spread = 100 * statistics.mean(accuracies), 100 * statistics.stdev(accuracies)
    assert f"{mean:.2f} ± {spread:.2f}" in markdown
    assert f"{mean - 2:.2f} ± {spread:.2f}" in markdown
    assert "+2.00" in markdown


def test_one_seed_has_no_spread(tmp_path):
    put(tmp_path / "a")
    put(tmp_path / "b", "two-phase")
    html, markdown = pages(tmp_path)
    table = markdown.split("## Results")[1].split("\n## ")[0]
    assert "91.00 ±" not in table and "(1 seed)" in markdown and "1 seed" in html


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"test_accuracy": 0.85}, "Lower test accuracy than dense"),
        ({"train_seconds": 12.0}, "Slower than dense"),
        ({"peak_memory_bytes": 2**27}, "(?i)more peak memory|peak memory than dense"),
        ({"training_macs": 2 * 10**9}, "(?i)multiply-adds"),
        ({"block_sparsity": 0.5}, "Missed its target sparsity"),
        ({"test_loss": None}, "not finite"),
        ({}, None),
    ],
)
def test_every_warning_comes_exactly_when_it_is_due(tmp_path, changes, says):
    put(tmp_path / "a")
    put(tmp_path / "b", "two-phase", **changes)
    _, markdown = pages(tmp_path)
    found = warnings_of(markdown)
    if says is None:
        assert "dense" not in found.replace("no dense", "") and "Missed" not in found
    else:
        assert re.search(says, found), markdown
        others = ["Lower test", "Slower", "Missed", "not finite"]
        assert sum(other in found for other in others) <= 1


def test_without_dense_nothing_is_compared(tmp_path):
    put(tmp_path / "b", "two-phase")
    html, _ = pages(tmp_path)
    assert "add one with --method dense" in html


def test_the_page_needs_nothing_else_and_is_the_same_every_time(tmp_path):
    put(tmp_path / "a")
    put(tmp_path / "b", "two-phase")
    html, markdown = pages(tmp_path)
    assert not re.search(r"<script|(?:src|href)\s*=\s*[\"'](?!data:|#)", html)
    assert html.count("<svg") + html.count("data:image/") >= 4
    assert (html, markdown) == pages(tmp_path)


def test_hostile_text_is_escaped(tmp_path):
    surgery = {"selected": [], "left_dense": [{"name": "<script>alert(1)</script>", "reason": "a | b <img src=x>"}]}
    put(tmp_path / "a")
    put(tmp_path / "b", "two-phase", surgery=surgery)
    html, markdown = pages(tmp_path)
    assert "&lt;script&gt;" in html and "<script>" not in html and "<img src=x>" not in html
    assert "<script>" not in markdown


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: path.write_text("{"), "cannot read"),
        (lambda path: path.write_text("[]"), "is not a result of version 1"),
        (lambda path: path.write_text(json.dumps({**BASE, "version": 9})), "is not a result of version 1"),
        (lambda path: path.write_text(json.dumps({**BASE, "train_seconds": None})), "no number for train_seconds"),
        (lambda path: path.unlink(), "holds no result.json"),
        (lambda path: path.with_name("masks.safetensors").write_bytes(b"x"), "masks.safetensors"),
    ],
)
def test_damaged_results_are_named(tmp_path, spoil, says):
    folder = put(tmp_path / "a")
    spoil(folder / "result.json")
    with pytest.raises(KronblocksError, match=says):
        find_runs([folder])
