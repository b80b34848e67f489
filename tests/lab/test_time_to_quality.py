"""Time to quality: curves, what they are measured by, the table of the report, and sizes that were tried."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from tests.lab.made_up_runs import EPOCHS, put

from kronblocks.core.errors import KronblocksError
from kronblocks_lab.commands import compare
from kronblocks_lab.report import figures
from kronblocks_lab.report.comparison import compared
from kronblocks_lab.report.curves import CPU_SECONDS, MACS, SECONDS, Curve, best_by, curve_of, first_reached, mean_curve
from kronblocks_lab.report.page import write_report
from kronblocks_lab.report.results import find_runs
from kronblocks_lab.report.sizes import read_sizes
from kronblocks_lab.report.time_to_quality import TimeToQuality, axis_of
from kronblocks_lab.training.settings import CompareConfig

TIMES = "\N{MULTIPLICATION SIGN}"
QUIET = {"seconds": 10.0, "cpu_seconds": 9.9, "other_seconds": 0.1, "device": "cpu", "cores": 2, "others": 0.01, "quiet": True}
BUSY = {**QUIET, "others": 1.5, "quiet": False}


def evaluations(accuracies: list[float], every: float = 1.0, sparse_from: int = 0) -> list[dict]:
    """Evaluations of a training to 75% zeros, which it has from one of them on."""
    return [
        {
            "step": 10 * number,
            "seconds": every * number,
            "cpu_seconds": 0.9 * every * number,
            "training_macs": 10**9 * number,
            "validation_accuracy": accuracy,
            "validation_loss": None if accuracy is None else 1 - accuracy,
            "block_sparsity": 0.75 if number > sparse_from else 0.5,
        }
        for number, accuracy in enumerate(accuracies, 1)
    ]


def timed(folder: Path, accuracies: list[float], method: str = "two-phase", seed: int = 0, **changes) -> Path:
    shown = evaluations(accuracies, changes.pop("every", 1.0), changes.pop("sparse_from", 0))
    return put(folder, method, seed, **{"evaluations": shown, "clock": QUIET, **changes})


def table(*folders: Path) -> dict[str, list[str]]:
    (task,) = compared(find_runs(folders))
    return {cells[0]: cells[1:] for cells in TimeToQuality(task).table}


def test_the_table_says_when_dense_was_reached_and_what_was_best_until_parts_of_its_time(tmp_path):
    timed(tmp_path / "dense", [0.2, 0.4, 0.6, 0.8], "dense")
    timed(tmp_path / "fast", [0.3, 0.7, 0.9], "static", every=0.5)
    timed(tmp_path / "slow", [0.2, 0.5, 0.7], every=2.0)
    found = table(tmp_path)
    assert found["dense"] == ["4.00", "80.00", f"4.00, 1.00{TIMES}", "20.00", "40.00", "80.00"]
    assert found["static 16x16"] == ["1.50", "90.00", f"1.25, 0.31{TIMES}", "70.00", "90.00", "90.00"]
    assert found["two-phase 16x16"] == ["6.00", "70.00", "not reached", "not yet", "20.00", "50.00"]


def test_seeds_that_did_not_reach_it_are_counted(tmp_path):
    for seed, last in enumerate((0.8, 0.71)):
        timed(tmp_path / f"d{seed}", [0.6, last], "dense", seed)
    for seed, last in enumerate((0.9, 0.7)):
        timed(tmp_path / f"s{seed}", [0.6, 0.7, last], "static", seed)
    assert table(tmp_path)["dense"][2] == f"2.00 ± 0.000, 1.00{TIMES}"  # each its own
    found = table(tmp_path)["static 16x16"]
    assert found[:3] == ["3.00 ± 0.000", "80.00 ± 14.14", f"2.50, 1.25{TIMES}, in 1 of 2 trainings, else not reached"]


def test_models_count_from_when_they_have_their_zeros(tmp_path):
    timed(tmp_path / "dense", [0.2, 0.4, 0.6, 0.8], "dense")
    timed(tmp_path / "late", [0.9, 0.9, 0.5, 0.9], sparse_from=2)
    assert table(tmp_path)["two-phase 16x16"] == ["4.00", "90.00", f"3.75, 0.94{TIMES}", "not yet", "not yet", "90.00"]


def test_a_training_that_diverged_has_no_good_end(tmp_path):
    timed(tmp_path / "dense", [0.2, 0.4, 0.6], "dense")
    timed(tmp_path / "lost", [0.5, 0.9, None], "static")
    assert table(tmp_path)["static 16x16"] == ["2.00", "-inf", f"1.25, 0.42{TIMES}", "not yet", "70.00", "90.00"]
    timed(tmp_path / "other", [0.4, None], "dense", 1)
    assert table(tmp_path)["static 16x16"] == ["2.00", "-inf"]


def test_of_losses_less_is_better():
    curve = Curve(np.array([1.0, 2, 3]), np.array([3.0, 1, 2]))
    assert first_reached(curve, 2.0, more_is_better=False) == 1.5
    assert best_by(curve, 2.5, more_is_better=False) == 1.0
    assert best_by(curve, 0.5, more_is_better=False) is None
    assert first_reached(curve, 0.5, more_is_better=False) is None
    assert first_reached(curve._replace(from_=3), 3.0, more_is_better=False) is None


def test_means_are_taken_where_all_have_values():
    mean, spread = mean_curve([Curve(np.array([1.0, 3]), np.array([0.0, 2])), Curve(np.array([2.0, 4]), np.array([3.0, 5]), 1)])
    assert mean.x.tolist() == [2, 3] and mean.y.tolist() == [2, 3] and mean.from_ == 2
    assert spread == pytest.approx(np.std([1, 3], ddof=1))
    apart, _ = mean_curve([Curve(np.array([1.0]), np.array([0.0])), Curve(np.array([2.0]), np.array([4.0]))])
    assert len(apart.x) == 1


def result(**changes) -> dict:
    return {"threads": 1, "versions": {"processor": "one"}, "clock": QUIET, **changes}


@pytest.mark.parametrize(
    ("others", "axis", "says"),
    [
        ([{}], SECONDS, "Seconds on the clock: 1 thread on 2 processors, of which others used 0.01 at most"),
        ([{"threads": 2}], MACS, "had 1 or 2 threads"),
        ([{"versions": {"processor": "two"}}], MACS, "ran on different machines"),
        ([{"clock": BUSY}], CPU_SECONDS, "Others used up to 1.50 of 2 processors.*one thread are shown"),
        ([{"clock": {**QUIET, "quiet": None, "others": None}}], CPU_SECONDS, "Others used|Nothing tells"),
        ([{"clock": None}], MACS, "multiply-adds are shown instead. They are not time"),
    ],
)
def test_seconds_on_the_clock_count_where_the_machine_was_idle_only(others, axis, says):
    found, note = axis_of([result(), *(result(**each) for each in others)])
    assert found == axis
    assert re.search(says, note)


def test_busy_threads_are_compared_by_multiply_adds():
    busy = [result(threads=2, clock=BUSY)] * 2
    assert axis_of(busy)[0] == MACS


def test_older_results_have_the_curve_of_their_epochs_or_none(tmp_path):
    (run,) = find_runs([put(tmp_path / "a", "dense")])
    assert curve_of(run.result, SECONDS, "validation_accuracy") is None
    for number, epoch in enumerate(run.result["history"], 1):
        epoch["seconds"] = 2.0 * number
    curve = curve_of(run.result, SECONDS, "validation_accuracy")
    assert curve is not None and curve.x.tolist() == [2, 4, 6] and curve.y.tolist() == pytest.approx([0.6, 0.7, 0.8])


def test_the_report_shows_curves_budgets_and_what_was_busy(tmp_path):
    budget = {"seconds": 10.0, "clock": "wall", "epochs": EPOCHS, "steps": 30, "estimated_seconds": 9.5, "timed_steps": 100}
    budget |= {"timing_seconds": 2.0}
    sizes = {"dense": [64], "two-phase": [128]}
    for method, widths in sizes.items():
        settings = {"widths": widths, "budget_seconds": 10.0}
        timed(tmp_path / method, [0.5, 0.7], method, clock=BUSY, budget=budget, settings=settings, threads=1)
    path = write_report(find_runs([tmp_path]), tmp_path / "out")
    html, markdown = path.read_text(), path.with_suffix(".md").read_text()
    assert "A busy machine" in html and "others used up to 1.50 processors in 2 of the trainings" in markdown
    assert "### digits, mlp, 10 s of training, batches of 32" in markdown  # one task, whatever the size
    assert "| two-phase 16x16 | 10 | 30.0 | 2.00 s, 100 steps | 9.50 | 10.0 |" in markdown
    assert "128, rank 4, target 75 %" in markdown and "CPU seconds of training" in html
    content = json.loads((tmp_path / "out/curves.json").read_text())
    (task,) = content.values()
    assert task["axis"] == "cpu_seconds" and [line["y"] for line in task["lines"]] == [[[0.5, 0.7]]] * 2


def test_sizes_within_a_budget_are_rows_of_their_own(tmp_path):
    budget = {"seconds": 10.0, "clock": "wall", "epochs": EPOCHS, "steps": 30, "estimated_seconds": 9.5}
    for widths in (64, 128):
        put(tmp_path / str(widths), "dense", settings={"widths": [widths]}, budget=budget)
    (task,) = compared(find_runs([tmp_path]))
    assert [row.name for row in task.rows] == ["dense, widths 128", "dense, widths 64"]


def test_without_times_there_is_no_such_section(tmp_path):
    path = write_report(find_runs([put(tmp_path / "a", "dense")]), tmp_path / "out")
    assert "Time to quality" not in path.read_text() and (tmp_path / "out/curves.json").read_text() == "{}"


SHARED = {"data": "digits", "block_size": "16", "budget_seconds": 10.0, "threads": 1, "methods": ("dense", "two-phase")}


def test_every_method_gets_the_size_that_is_best_on_validation(tmp_path, monkeypatch):
    best, trained = {"dense": 0.8, "two-phase": 0.7}, []

    def train(run):
        trained.append(run.out.name)
        if run.out.exists() and (run.out / "result.json").exists():
            return
        accuracy = best[run.method] - abs(run.widths[0] - (64 if run.method == "dense" else 128)) / 1000
        budget = {"seconds": 10.0, "clock": "wall", "epochs": EPOCHS, "steps": 30, "estimated_seconds": 9.5}
        settings = {**run.settings(), "epochs": EPOCHS}
        changes = {"validation_accuracy": accuracy, "validation_loss": 1.0, "test_accuracy": 1 - accuracy, "budget": budget}
        put(run.out, run.method, run.seed, settings=settings, **changes)

    monkeypatch.setattr(compare, "train_apart", train)
    monkeypatch.setattr(compare, "_share_length", lambda *_: None)
    monkeypatch.setattr(figures, "panel", lambda draw, alt: figures.Picture("", alt, 1, 1))
    compare.main(CompareConfig(out=tmp_path / "out", seeds=(3, 4), try_sizes=("widths=64", "widths=128"), **SHARED))
    assert trained[:4] == [f"{m}-widths{w}-s3" for w in (64, 128) for m in ("dense", "two-phase-16x16")]
    assert sorted(trained[4:]) == [f"{m}-s{s}" for m in ("dense-widths64", "two-phase-16x16-widths128") for s in (3, 4)]
    sizes = read_sizes(tmp_path / "out")
    assert sizes is not None
    assert [(each.method, each.size) for each in sizes.tried if each.chosen] == [
        ("dense", "widths=64"),
        ("two-phase", "widths=128"),
    ]
    assert len(find_runs([tmp_path / "out"])) == 4  # what was not chosen is left out
    assert len(find_runs([tmp_path / "out" / "dense-widths128-s3"])) == 1  # unless it is named
    assert "| dense | widths=64 | 30 | 0.8000 | chosen |" in (tmp_path / "out/report.md").read_text()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"try_sizes": ("width64",)}, "cannot read 'width64' of --try-sizes"),
        ({"try_sizes": ("lr=1",)}, "cannot read 'lr=1'"),
        ({"try_sizes": ("width=64",)}, "--width is for"),
        ({"try_sizes": ("widths=0",)}, "cannot read 'widths=0'"),
        ({"try_sizes": ("widths=64", "widths=64")}, "names a size twice"),
        ({"try_sizes": ("widths=64",), "budget_seconds": None}, "add --budget-seconds"),
    ],
)
def test_sizes_that_cannot_be_are_refused(tmp_path, changes, says):
    with pytest.raises(KronblocksError, match=says):
        CompareConfig(out=tmp_path, **{**SHARED, **changes})


def test_damaged_sizes_are_an_error(tmp_path):
    put(tmp_path / "a")
    (tmp_path / "sizes.json").write_text('{"seed": 0}')
    with pytest.raises(KronblocksError, match=r"sizes\.json cannot be read"):
        find_runs([tmp_path])


def test_a_budget_that_cannot_be_read_is_an_error(tmp_path):
    with pytest.raises(KronblocksError, match="has a budget of time that cannot be read"):
        find_runs([put(tmp_path / "a", budget={"seconds": 1})])
