"""Folders of trainings that never ran, for tests of what reads them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from kronblocks_lab.training.settings import RESULT_VERSION

EPOCHS = 3


def put(
    folder: Path,
    method: str = "two-phase",
    seed: int = 0,
    *,
    settings: dict | None = None,
    phases: str = "discover refine heal",
    losses: list | None = None,
    **changes,
) -> Path:
    """Write a made-up training of one layer of 64x32 in 16x16 blocks, a quarter of them live; `changes` go into the result."""
    sparse = method != "dense"
    history = [
        {
            "epoch": epoch,
            "phase": phase if sparse else "dense",
            "train_loss": loss,
            "validation_loss": 1.0,
            "validation_accuracy": 0.5 + epoch / 10,
            "block_sparsity": 0.25 * epoch * sparse,
            "trainable_parameters": 2000 - 500 * sparse,
        }
        for epoch, phase, loss in zip(range(1, EPOCHS + 1), phases.split(), losses or [1.0, 0.5, 0.2], strict=True)
    ]
    layer = {"name": "1", "out_features": 64, "in_features": 32, "block_size": "16x16", "total_blocks": 8}
    result = {
        "version": RESULT_VERSION,
        "test_accuracy": 0.9,
        "test_loss": 0.3,
        "block_sparsity": 0.75 * sparse,
        "live_blocks": 2 if sparse else 8,
        "total_blocks": 8,
        "train_seconds": 10.0,
        "peak_memory_bytes": 2**26,
        "peak_memory_exact": True,
        "bytes": {"parameters": 2**20, "gradients": 2**20, "optimizer_state": 2**21, "saved_tensors": 2**20},
        "trainable_parameters_start": 2000 - 500 * sparse,
        "trainable_parameters_max": 2000 - 500 * sparse,
        "trainable_parameters_end": 2000 - 500 * sparse,
        "training_macs": 10**9,
        "inference_macs_per_sample": 10**6,
        "layers": [{**layer, "live_blocks": 2 if sparse else 8, "sparsity": 0.75 * sparse}],
        "surgery": {"selected": [{"name": "1", "block_size": "16x16", "note": ""}] * sparse, "left_dense": []},
        "history": history,
        "config": {
            "data": "digits",
            "model": "mlp",
            "widths": [64],
            "method": method,
            "block_size": "16",
            "rank": 4,
            "sparsity": 0.75,
            "epochs": EPOCHS,
            "seed": seed,
            "batch_size": 32,
            "lr": None,
            "schedule": {"start": 0.05, "end": None},
            "penalty": {"strength": None},
            "recipe": {"lr": 0.004, "factor_weight_decay": 0.0},
        }
        | (settings or {}),
        "threads": 2,
        "versions": {"torch": "2.13.0", "processor": "made up"},
    } | changes
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))
    mask = np.array([[1, 0], [0, 0], [0, 1], [0, 0]], np.uint8)
    save_file({layer["name"]: mask for layer in result["layers"]} if sparse else {}, folder / "masks.safetensors")
    return folder
