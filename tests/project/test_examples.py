"""Every example trains to its sparsity, and its saved model is as good in another process: that of the tests."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits

import kronblocks

EXAMPLES = Path(__file__).parents[2] / "examples"
# DistributedDataParallel keeps gloo's threads past destroy_process_group, in plain PyTorch too, and rarely one of them aborts
# its process while Python shuts down: everything has been printed and saved by then, and that is what the test looks at
GLOO_ABORT = "terminate called without an active exception"
TRANSFORMERS = ("hf_trainer.py", "from_trained.py")
RUNS = {path.name: [sys.executable, str(path)] for path in sorted(EXAMPLES.glob("*.py"))}
RUNS["torchrun_ddp.py"] = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "2",
    str(EXAMPLES / "torchrun_ddp.py"),
]
RUNS["accelerate_loop.py, two processes"] = [*RUNS["torchrun_ddp.py"][:-1], str(EXAMPLES / "accelerate_loop.py")]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_example(name, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "KRONBLOCKS_MEASURE": "0"}
    run = subprocess.run([*RUNS[name], str(tmp_path / "saved")], capture_output=True, text=True, env=environment)
    assert run.returncode == 0 or ("torch.distributed.run" in RUNS[name] and GLOO_ABORT in run.stderr), run.stderr
    found = re.search(r"([\d.]+)% of the weights in zero blocks, test accuracy ([\d.]+)", run.stdout)
    assert found is not None, run.stdout
    sparsity, accuracy = float(found[1]), float(found[2])
    least = (80, 0.75) if name in TRANSFORMERS else (90, 0.86)
    assert sparsity >= least[0] and accuracy > least[1], run.stdout
    if name == "from_trained.py":
        dense = re.search(r"dense: test accuracy ([\d.]+)", run.stdout)
        assert dense is not None and accuracy > float(dense[1]) - 0.01 - 1 / 397  # less than a point, and an image
    assert loaded_accuracy(name, tmp_path / "saved") == pytest.approx(accuracy, abs=0.0006)  # which was printed with 3 digits


def loaded_accuracy(name: str, folder: Path) -> float:
    """The accuracy of the model that an example saved, on the images that it was not trained with."""
    images, labels = (torch.tensor(values) for values in load_digits(return_X_y=True))
    images, labels = images[1400:].float(), labels[1400:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name in TRANSFORMERS:  # their folder says what the model is
            model, images = kronblocks.from_pretrained(folder), images.view(-1, 1, 8, 8) / 8 - 1
        else:
            model = kronblocks.from_pretrained(folder, runpy.run_path(str(EXAMPLES / name.split(",")[0]))["make"])
            images = images / 16
    with torch.no_grad():
        y = model.eval()(images)
    return (getattr(y, "logits", y).argmax(1) == labels).float().mean().item()
