"""Several processes train one model: the same masks everywhere, and what one process with the whole batch finds."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

WORKER = Path(__file__).with_name("worker.py")


@pytest.fixture(scope="module")
def worker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def launched(scenario: str, world: int, folder: Path) -> Path:
    """The folder with what the processes of a scenario wrote."""
    command = [sys.executable, "-W", "ignore", str(WORKER), scenario]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(world)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * world, "\n\n".join(outputs)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    return launched("two", 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> Path:
    return launched("four", 4, tmp_path_factory.mktemp("four"))


EXACT = ("two-phase", "kron-l1", "group-lasso", "magnitude", "static")  # rigl grows by norms of each rank's own gradient


@pytest.mark.parametrize("method", [*EXACT, "rigl"])
@pytest.mark.parametrize("world", [2, 4])
def test_ddp(worker, two, four, method, world):
    folder = {2: two, 4: four}[world]
    found = [torch.load(folder / f"ddp-{method}-{rank}.pt", weights_only=True) for rank in range(world)]
    for other in found[1:]:
        assert torch.equal(other["masks"], found[0]["masks"]) and torch.equal(other["losses"], found[0]["losses"])
    assert found[0]["sparsity"] == pytest.approx(0.75, abs=0.02)
    if method in EXACT:
        model, sparsifier = worker.make(method)
        alone = worker.train(model, sparsifier, 0, 1)
        assert torch.equal(alone["masks"], found[0]["masks"])
        assert torch.allclose(alone["losses"], found[0]["losses"], rtol=0, atol=1e-9)


def test_ranks_that_train_apart_are_an_error(two):
    for rank in range(2):
        assert "wrap the model in DistributedDataParallel" in (two / f"unwrapped-{rank}.txt").read_text()
