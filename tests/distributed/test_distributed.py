"""Several processes train one model: the same masks everywhere, and what one process with the whole batch finds."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tests.distributed import worker
from tests.processes import Processes

from kronblocks import from_pretrained, save_pretrained

pytestmark = pytest.mark.slow


def launched(processes: Processes, scenario: str, world: int, folder: Path) -> Path:
    """The folder with what the processes of a scenario wrote."""
    started = [processes.start(worker.main, scenario, rank, world, folder) for rank in range(world)]
    ended = [each.end() for each in started]
    assert [status for status, _ in ended] == [0] * world, "\n\n".join(said for _, said in ended)
    return folder


@pytest.fixture(scope="module")
def two(processes, tmp_path_factory) -> Path:
    return launched(processes, "two", 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(processes, two, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("four")
    shutil.copytree(two, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("rendezvous", "ddp-*", "fsdp-*"))
    return launched(processes, "four", 4, folder)


EXACT = ("two-phase", "kron-l1", "group-lasso", "magnitude", "static")  # rigl grows by norms of each rank's own gradient
ALL = (*EXACT, "rigl")
RUNS = [
    *((2, "ddp", method) for method in (*ALL, "elastic-group-lasso")),
    *((2, "static", method) for method in ("two-phase", "group-lasso")),
    (2, "group", "two-phase"),
    *((2, "fsdp", method) for method in ALL),
    *((4, way, method) for way in ("ddp", "fsdp") for method in ("two-phase", "rigl")),
]


@pytest.mark.parametrize(("world", "way", "method"), RUNS)
def test_processes_do_what_one_does(two, four, way, method, world):
    folder = {2: two, 4: four}[world]
    found = [torch.load(folder / f"{way}-{method}-{rank}.pt", weights_only=True) for rank in range(world)]
    for other in found[1:]:
        assert torch.equal(other["masks"], found[0]["masks"]) and torch.equal(other["losses"], found[0]["losses"])
    assert found[0].get("calls", worker.STEPS) >= worker.STEPS
    assert found[0]["sparsity"] == pytest.approx(0.75, abs=0.02)
    if method != "rigl":
        model, sparsifier = worker.make(method)
        alone = worker.train(model, sparsifier, 0, 1)
        assert torch.equal(alone["masks"], found[0]["masks"])
        assert torch.allclose(alone["losses"], found[0]["losses"], rtol=0, atol=1e-9)


@pytest.fixture(scope="module")
def one(processes, tmp_path_factory) -> Path:
    return launched(processes, "one", 1, tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize("way", ["ddp", "static", "frozen", "fsdp"])
def test_one_process_wrapped_does_what_it_does_unwrapped(one, way):
    model, sparsifier = worker.make("two-phase")
    alone = worker.train(model, sparsifier, 0, 1)
    found = torch.load(one / f"alone-{way}.pt", weights_only=True)
    assert torch.equal(alone["masks"], found["masks"])
    assert torch.allclose(alone["losses"], found["losses"], rtol=0, atol=1e-9)


def test_zero_is_refused_before_a_lift_and_works_without_one(one):
    assert "use its inner optimiser with DistributedDataParallel" in (one / "zero.txt").read_text()
    model, sparsifier = worker.make("magnitude")
    alone = worker.train(model, sparsifier, 0, 1, torch.optim.AdamW(model.parameters(), lr=1e-2))
    found = torch.load(one / "zero.pt", weights_only=True)
    assert torch.equal(alone["masks"], found["masks"]) and torch.equal(alone["losses"], found["losses"])


@pytest.mark.parametrize("method", ["two-phase", "magnitude"])
def test_a_sharded_checkpoint_goes_on_with_another_number_of_processes(four, method):
    found = [torch.load(four / f"resumed-{method}-{rank}.pt", weights_only=True) for rank in range(4)]
    model, sparsifier = worker.make(method)
    alone = worker.train(model, sparsifier, 0, 1)
    for each in found:
        assert torch.equal(each["masks"], alone["masks"][worker.STOP :])
        assert torch.allclose(each["losses"], alone["losses"][worker.STOP :], rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", ["two-phase", "magnitude"])
def test_a_full_checkpoint_of_a_sharded_model_is_one_of_one_process(two, method, tmp_path):
    model, sparsifier = worker.make(method)
    sparsifier.load_state_dict(torch.load(two / f"{method}-sparsifier.pt", weights_only=True))
    model.load_state_dict(torch.load(two / f"{method}-whole.pt", weights_only=True))
    alone, other = worker.make(method)
    worker.train(alone, other, 0, 1, last=worker.STOP)
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    folder = save_pretrained(model, tmp_path / "model", sparsifier=sparsifier)
    again = from_pretrained(folder, worker.make(method)[0])
    x, _ = worker.batch(0, 0, 1)
    torch.testing.assert_close(again(x), model.eval()(x), rtol=0, atol=1e-9)
    for rank in range(2):
        assert "this process holds only a part" in (two / f"{method}-part-{rank}.txt").read_text()


def test_ranks_that_train_apart_are_an_error(two):
    for rank in range(2):
        assert "Wrap the model in DistributedDataParallel" in (two / f"unwrapped-{rank}.txt").read_text()


def test_a_wrapper_of_another_model_is_refused(two):
    for rank in range(2):
        assert "without a DistributedDataParallel around the model" in (two / f"another-{rank}.txt").read_text()
