"""Every example trains to its sparsity, and its saved model is as good in another process: that of the tests."""

from __future__ import annotations

import re
import runpy
import warnings
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from tests.processes import Processes, group, script

import kronblocks

EXAMPLES = Path(__file__).parents[2] / "examples"
TRANSFORMERS = ("hf_trainer.py", "from_trained.py")
ON_TWO = ("torchrun_ddp.py", "accelerate_loop.py")
RUNS = [
    *((path.name, 1) for path in sorted(EXAMPLES.glob("*.py")) if path.name != "torchrun_ddp.py"),
    *((name, 2) for name in ON_TWO),
]


def run(processes: Processes, path: Path, world: int, *arguments: str) -> str:
    """What the script prints, in processes with the environment that torchrun gives them if there are several."""
    ranks = group(world) if world > 1 else [{}]
    started = [processes.start(script, path, *arguments, KRONBLOCKS_MEASURE="0", **rank) for rank in ranks]
    ended = [each.end() for each in started]
    assert [status for status, _ in ended] == [0] * world, ended
    return "".join(said for _, said in ended)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "world"), RUNS)
def test_example(name, world, tmp_path, processes):
    said = run(processes, EXAMPLES / name, world, str(tmp_path / "saved"))
    found = re.search(r"([\d.]+)% of the weights in zero blocks, test accuracy ([\d.]+)", said)
    assert found is not None, said
    sparsity, accuracy = float(found[1]), float(found[2])
    least = (80, 0.75) if name in TRANSFORMERS else (90, 0.86)
    assert sparsity >= least[0] and accuracy > least[1], said
    if name == "from_trained.py":
        dense = re.search(r"dense: test accuracy ([\d.]+)", said)
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
            model = kronblocks.from_pretrained(folder, runpy.run_path(str(EXAMPLES / name))["make"])
            images = images / 16
    with torch.no_grad():
        y = model.eval()(images)
    return (getattr(y, "logits", y).argmax(1) == labels).float().mean().item()
