"""`kronblocks doctor`: what it finds on a machine where things work, and where they do not."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from kronblocks.advice import doctor, paths
from kronblocks.ops import backends
from kronblocks.ops.backends import library
from kronblocks.ops.backends import torch as plain
from kronblocks_lab.__main__ import main


@pytest.fixture
def quick(monkeypatch):
    """Nothing is timed."""
    monkeypatch.setattr(doctor, "speeds", lambda device: iter([("a layer", 1e-3, 2e-3)]))


def found(about: str) -> list[doctor.Finding]:
    return [each for each in doctor.examine() if each.about == about]


@pytest.mark.usefixtures("quick")
def test_this_machine_works(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    main(["doctor"])
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    assert said.splitlines()[-1] == "everything works that should"
    assert "agrees with float64: dense, tile_first," in said and "1 ms, dense 2 ms: 2x" in said


def test_paths_are_timed_beside_dense():
    timed = list(paths.speeds("cpu"))
    assert any(what.startswith("values packed, 90% zeros") for what, _, _ in timed)
    assert all(0 < seconds < 60 and 0 < dense < 60 for _, seconds, dense in timed)


@pytest.mark.usefixtures("quick")
def test_json_is_one_document_and_a_failure_ends_with_1(capsys, monkeypatch, tmp_path):
    file = tmp_path / "a file"
    file.touch()
    monkeypatch.setenv("KRONBLOCKS_CACHE", str(file / "folder"))
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--json"])
    assert ended.value.code == 1
    report = json.loads(capsys.readouterr().out)
    assert report["works"] is False
    (failed,) = (each for each in report["findings"] if each["state"] == "fails")
    assert failed["about"] == "cache" and "name another in KRONBLOCKS_CACHE" in failed["what"]


@pytest.mark.usefixtures("quick")
def test_a_path_that_computes_wrong_numbers_fails(monkeypatch):
    backward = plain.kron_backward
    monkeypatch.setattr(plain, "kron_backward", lambda *given: tuple(1.01 * each for each in backward(*given)))
    monkeypatch.setattr(backends, "pick", lambda tensor: plain)
    loaded = None if library.unavailable_reason() else library.load()
    with nullcontext() if loaded is None else loaded.aside():
        (failed, *_) = found("cpu float32")
    assert failed.state == "fails" and "dense: the gradient of x differs by 0." in failed.what


@pytest.mark.usefixtures("quick")
def test_a_path_that_raises_fails_and_the_rest_is_examined(monkeypatch):
    def broken(*_):
        raise RuntimeError("no such device\nmore")

    monkeypatch.setattr(paths.reference, "packed_weight", broken)
    (only,) = found("cpu float32")
    assert (only.state, only.what) == ("fails", "values packed: RuntimeError: no such device")
    monkeypatch.setattr(doctor, "_gpus", broken)
    assert found("GPUs") == [doctor.Finding("GPUs", "fails", "RuntimeError: no such device")]


@pytest.mark.parametrize(
    ("reason", "state"),
    [
        ("not built (there is no /x/_native.so)", "note"),
        ("switched off by KRONBLOCKS_NATIVE=0", "note"),
        ("/x/_native.so failed to load (bad)", "fails"),
    ],
)
def test_kernels_that_do_not_serve(reason, state, monkeypatch):
    monkeypatch.setattr(library, "unavailable_reason", lambda: reason)
    monkeypatch.setattr(library, "load", lambda: pytest.fail("they do not serve"))
    first, *_ = doctor._native()
    assert first.state == state and first.what.startswith(reason) and "PyTorch computes" in first.what


def test_threads_that_compete_fail(monkeypatch):
    class Loaded:
        path = Path("/x/_native.so")

        def instruction_set(self) -> str:
            return "avx2"

        def shares_threads(self) -> bool:
            return False

    monkeypatch.setattr(library, "unavailable_reason", lambda: None)
    monkeypatch.setattr(library, "load", Loaded)
    assert "fails" in [each.state for each in doctor._native() if each.about == "OpenMP"]


def test_a_gpu_that_torch_does_not_see_fails(monkeypatch):
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == "/dev/nvidia0" or exists(path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (only,) = doctor._gpus()
    assert only.state == "fails" and "torch sees none" in only.what


def test_verdicts_of_kernels_stand_a_line_each(monkeypatch):
    monkeypatch.setattr(doctor.trust, "known", lambda: {"kernel a": "", "kernel b": "y differs from float64 by 1"})
    monkeypatch.setattr(doctor, "PATHS", ())
    assert [(each.state, each.what) for each in doctor._verdicts(["cuda:0"])] == [
        ("ok", "kernel a: agrees with float64"),
        ("fails", "kernel b: y differs from float64 by 1"),
    ]
