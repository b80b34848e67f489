"""What goes wrong around a training: it is killed, the disk is full, two of them want one folder, it runs for very long."""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from tests.processes import module
from tests.reliability.trainings import arguments, limit_files, train
from torch import nn

from kronblocks import (
    BlockSparseLinear,
    KronblocksError,
    SparsityConfig,
    from_pretrained,
    parameter_groups,
    save_pretrained,
    sparsify_,
)

pytestmark = pytest.mark.slow

LASTING = ("test_accuracy", "test_loss", "validation_loss", "block_sparsity", "training_macs", "trainable_parameters_end")


def outcome(out: Path) -> tuple:
    """What must be the same, however often a training was interrupted: numbers, masks and every bit of the model."""
    result = json.loads((out / "result.json").read_text())
    files = [*sorted((out / "model").iterdir()), out / "masks.safetensors"]
    return [result[name] for name in LASTING], len(result["history"]), [(path.name, path.read_bytes()) for path in files]


@pytest.fixture(scope="module")
def whole(processes, tmp_path_factory) -> tuple[Path, float]:
    """A training that nothing happens to, and its seconds."""
    out = tmp_path_factory.mktemp("whole") / "run"
    start = time.perf_counter()
    status, said = processes.start(train, out).end()
    assert status == 0, said
    return out, time.perf_counter() - start


def test_killed_at_random_moments(whole, processes, tmp_path, times, record):
    expected, kills, runs, longest = outcome(whole[0]), 0, 0, whole[1]
    generator = random.Random(0)
    wanted = times(2, 50)
    while kills < wanted:
        out = tmp_path / f"run-{runs}"
        while not (out / "result.json").exists():
            start, training = time.perf_counter(), processes.start(train, out)
            if training.ends_within(generator.uniform(0.2, 1.1) * longest if kills < wanted else None):
                status, said = training.end()
                assert status == 0, said
                longest = min(longest, time.perf_counter() - start)  # the first one may have shared the machine with others
            else:
                training.kill()
                kills += 1
        runs += 1
        assert outcome(out) == expected
    record(
        "training killed (SIGKILL)",
        f"{kills} times at random moments of {runs} trainings, each resumed until it ended",
        "every training ended with the same numbers, masks and model, bit for bit",
    )


def test_two_trainings_into_one_folder(whole, processes, tmp_path, record):
    out = tmp_path / "run"
    ends = sorted(training.end() for training in [processes.start(train, out) for _ in range(2)])
    assert ends[0][0] == 0 and (ends[1][0] == 0 or "another process is training" in ends[1][1]), ends
    assert outcome(out) == outcome(whole[0])
    record(
        "two trainings into one folder",
        "started at the same moment",
        "one is refused by name or finds the other's finished result; the result is that of one alone",
    )


def test_no_room_for_a_checkpoint(whole, processes, tmp_path, times, record):
    out = tmp_path / "run"
    sizes = [20_000, 500, 2_000, 8_000, 30_000, 40_000][: times(1, 6)]
    for size in sizes:
        status, said = processes.start(train, out, size).end()
        assert status not in (0, -signal.SIGSEGV), size
        assert said.strip() and "Traceback" not in said, said
    status, said = processes.start(train, out).end()
    assert status == 0, said
    assert outcome(out) == outcome(whole[0])
    record(
        "no room for a file while training",
        f"{len(sizes)} limits of file size, one after the other in one folder, then none",
        "an error without a traceback each time; with room again it goes on to the same bits",
    )


def save_a_large_model(folder: Path) -> None:
    limit_files(50_000)
    try:
        save_pretrained(nn.Sequential(BlockSparseLinear(256, 256, 16), nn.Linear(256, 256)), folder)
    except KronblocksError as error:
        sys.stdout.write(f"refused: {error}")


def test_no_room_for_a_model(processes, tmp_path, record):
    model = nn.Sequential(nn.Linear(8, 8))
    folder = save_pretrained(model, tmp_path / "saved")
    said = processes.run(save_a_large_model, folder)
    assert "refused: cannot save the model" in said and "is unchanged" in said
    assert torch.equal(from_pretrained(folder, nn.Sequential(nn.Linear(8, 8)))[0].weight, model[0].weight)
    assert not list(folder.glob(".*")), "a half-written file was left"
    record("no room for a file in save_pretrained", "a limit of file size", "refused; the model that was there before is whole")


def test_a_folder_that_cannot_be_written_to(processes, record):
    for place in ("/dev/null/run",):
        with pytest.raises(KronblocksError, match="cannot save the model"):
            save_pretrained(nn.Sequential(nn.Linear(4, 4)), place)
        status, said = processes.start(module, "kronblocks_lab", *arguments(Path(place))).end()
        assert status == 2 and "cannot write into" in said and "Traceback" not in said
    record("a folder that cannot be written to", "save_pretrained and kronblocks train", "one sentence before any work is done")


def resident() -> int:
    """Bytes of memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("method", ["two-phase", "rigl", "group-lasso"])
def test_memory_does_not_grow(method, times, record):
    steps = times(400, 10_000)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 16))
    sparsifier = sparsify_(model, SparsityConfig(method=method, block_size=8, target_sparsity=0.75, measure_plans=False))
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3))
    sparsifier.attach(optimizer, total_steps=steps)
    sizes, tensors = [], []
    for step in range(steps):
        x = torch.randn(32, 64)
        loss = (model(x) - x[:, :16]).square().mean() + sparsifier.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in (steps // 2, steps - 1):  # pruning is over, buffers have their sizes
            gc.collect()
            sizes.append(resident())
            tensors.append(sum(isinstance(each, torch.Tensor) for each in gc.get_objects()))
    assert tensors[1] <= tensors[0]
    grown = (sizes[1] - sizes[0]) / 2**20
    assert grown < 4
    record(
        "a very long training",
        f"{method}, {steps:,} steps",
        f"memory grew by {max(grown, 0):.1f} MiB over the second half, tensors by none",
    )
