"""Campaigns on text: rates are chosen by the validation loss, and tables show losses and say which text."""

from __future__ import annotations

import dataclasses

import pytest
from tests.lab.test_reproduce import in_this_process  # noqa: F401

from kronblocks import KronblocksError, ScheduleConfig
from kronblocks_lab.bench.measure.results import read
from kronblocks_lab.report.costs import BYTES
from kronblocks_lab.reproduce import campaign
from kronblocks_lab.reproduce.campaign import Campaign, best_trial
from kronblocks_lab.reproduce.commands import ReproduceConfig
from kronblocks_lab.reproduce.page.page import write
from kronblocks_lab.reproduce.studies import STUDIES, Cell, Study
from kronblocks_lab.reproduce.trials import rates


@pytest.fixture
def study(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("the quick brown fox " * 60)
    sizes = {"width": 16, "depth": 1, "heads": 1, "context": 8, "steps": 12}
    return Study(
        name="small",
        data="text",
        model="decoder",
        data_file=file,
        epochs=2,
        batch_size=4,
        methods=("dense", "static"),
        cells=(("4", 0.5),),
        tuned_at=0.5,
        seeds=(0,),
        tuning_seeds=(100,),
        base={**sizes, "schedule": ScheduleConfig(update_every=2)},
        rates=rates((1e-3, 2e-3, 4e-3), slice(0, 2)),
    )


@pytest.mark.slow
def test_trainings_on_text(study, tmp_path, in_this_process):  # noqa: F811
    one = dataclasses.replace(study, lr=2e-3)
    Campaign(one, tmp_path / "results", tmp_path / "work", jobs=1).run()
    data = read(tmp_path / "results/reproduce-small.json")
    assert {row["method"] for row in data["rows"]} == {"dense", "static"}
    assert data["settings"]["source"].startswith("book.txt, 1,200 bytes, SHA-256 ") and "book.txt" in one.data_file.name
    assert str(tmp_path) not in (tmp_path / "results/reproduce-small.json").read_text()
    page = write(tmp_path / "results", tmp_path / "page.md").read_text()
    dense = next(row for row in data["rows"] if row["method"] == "dense")
    assert "test loss, nats per character" in page and f"| {dense['test_loss']:.4f} |" in page
    assert "SHA-256" in page and "decoder (width 16, depth 1, heads 1, context 8), 12 steps, batch 4, 1 seeds" in page


def test_the_least_loss_is_chosen_and_trials_go_on_below_the_edge(study, tmp_path, monkeypatch):
    best = {"dense": 0, "static": 2}

    def finished(pending, jobs):
        for job in pending:
            loss = 1.0 + abs(job.trial - best[job.cell.method])
            made_up = {**dict.fromkeys((*campaign.MEASURED, *BYTES), 0.5), "blocks": "4x4"}
            yield job, {**made_up, "validation_loss": loss, "test_loss": loss}

    monkeypatch.setattr(campaign, "_finished", finished)
    rows = Campaign(study, tmp_path / "results", tmp_path / "work", jobs=1).run().rows
    assert {row["method"]: row["trial"] for row in rows if row["part"] == "compare"} == best
    page = write(tmp_path / "results", tmp_path / "page.md").read_text()
    assert "| **static** | 1.0000 |" in page


def test_a_trial_without_a_loss_is_never_the_best(study):
    def row(trial, loss):
        key = {"part": "tune", "method": "static", "block": "4", "sparsity": 0.5, "trial": trial, "seed": 100}
        return {**key, "validation_loss": loss, "validation_accuracy": 0.0}

    rows = [row(0, None), row(1, 3.0), row(2, 2.0)]
    assert best_trial(rows, Cell("static", "4", 0.5), (100,), study.measure) == 2


def test_own_studies_of_text_and_of_other_data(tmp_path):
    (own,) = ReproduceConfig(
        what="decoder", name="mine", data_file=tmp_path / "x.txt", steps=100, lr=4e-3, methods=("static",)
    ).studies()
    assert (own.data_file, own.base["steps"], own.lr, own.methods) == (tmp_path / "x.txt", 100, 4e-3, ("dense", "static"))
    assert own.base["width"] == STUDIES["decoder"].base["width"] and not own.tuned()
    (jpeg,) = ReproduceConfig(what="vit", name="jpeg", data_dir=tmp_path, data_label="JPEG copies", epochs=3).studies()
    assert jpeg.shared()["source"] == "cifar100 (JPEG copies)" and jpeg.data_dir == tmp_path
    assert ReproduceConfig(what="vit", data_dir=tmp_path).studies()[0].data_dir == tmp_path
    for settings, says in (
        ({"what": "decoder", "name": "mine", "steps": 101}, "--steps 101 is no multiple"),
        ({"what": "mlp", "name": "mine", "steps": 100}, "--steps is for --model decoder"),
        ({"what": "decoder", "steps": 100}, "add --name"),
    ):
        with pytest.raises(KronblocksError, match=says):
            ReproduceConfig(**settings).studies()
