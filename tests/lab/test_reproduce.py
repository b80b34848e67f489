"""Campaigns: every method tuned alike, what is done is not done again, and the page says what the rows say."""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kronblocks import KronblocksError
from kronblocks.config.methods import METHODS, spec_of
from kronblocks.core.errors import Diverged
from kronblocks_lab.__main__ import main
from kronblocks_lab.bench.measure.results import read
from kronblocks_lab.reproduce import campaign, studies
from kronblocks_lab.reproduce.campaign import Campaign, best_trial
from kronblocks_lab.reproduce.commands import ReproduceConfig
from kronblocks_lab.reproduce.page.figures import draw
from kronblocks_lab.reproduce.page.page import summary, write
from kronblocks_lab.reproduce.searches import SearchStudy
from kronblocks_lab.reproduce.searches import page as searches_page
from kronblocks_lab.reproduce.statistics import CellResult, cells, paired
from kronblocks_lab.reproduce.studies import STUDIES, Cell, Study
from kronblocks_lab.reproduce.trials import Space, rates, space_of

TINY = Study(
    name="tiny",
    data="digits",
    widths=(16,),
    epochs=2,
    batch_size=64,
    methods=("dense", "two-phase", "rigl"),
    cells=(("4", 0.5),),
    tuned_at=0.5,
    seeds=(0, 1),
    tuning_seeds=(100,),
    rates=rates((4e-3, 8e-3), slice(0, 2)),
)


def run_tiny(folder: Path) -> None:
    """In a process that knows nothing of the tests before, whose pool need not import everything again."""
    forking = multiprocessing.get_context("fork")
    campaign.multiprocessing.get_context = lambda method: forking
    Campaign(TINY, folder / "results", folder / "work", jobs=2).run()


@pytest.fixture(scope="module")
def finished(processes, tmp_path_factory):
    """A whole tiny campaign, with two trials a method."""
    folder = tmp_path_factory.mktemp("reproduce")
    processes.run(run_tiny, folder)
    return folder


@pytest.mark.slow
def test_rows_of_a_campaign(finished):
    data = read(finished / "results/reproduce-tiny.json")
    tuned = [row for row in data["rows"] if row["part"] == "tune"]
    compared = [row for row in data["rows"] if row["part"] == "compare"]
    assert len(tuned) == 3 * 2 and len(compared) == 3 * 2
    assert {row["seed"] for row in tuned} == {100} and {row["seed"] for row in compared} == {0, 1}
    for row in compared:
        assert row["trial"] == best_trial(data["rows"], Cell(row["method"], row["block"], row["sparsity"]), TINY.tuning_seeds)
        assert (row["block_sparsity"] >= 0.5) == (row["method"] != "dense")
    assert next(row for row in compared if row["method"] == "rigl")["blocks"] == "2x4 4x4"
    assert {row["settings"] for row in tuned if row["trial"] == 1} == {"lr 0.008"}
    kept = sorted(path.name for path in (finished / f"work/tiny/rigl-4-0.5-t0-s100-r{spec_of('rigl').revision}").iterdir())
    assert kept == [".lock", "config.json", "result.json"]


@pytest.fixture
def in_this_process(monkeypatch):
    """Trainings in threads of this process, where nothing has to be imported first. Those of `finished` have processes."""
    monkeypatch.setattr(campaign, "ProcessPoolExecutor", lambda jobs, context, initializer: ThreadPoolExecutor(1))


@pytest.mark.slow
def test_variants_of_one_method(tmp_path, in_this_process):
    variants = {"as it is": {}, "rank 1": {"rank": 1}}
    study = dataclasses.replace(TINY, name="some", methods=("two-phase",), variants=variants)
    rows = Campaign(study, tmp_path / "results", tmp_path / "work", jobs=2).run().rows
    assert {row["part"] for row in rows} == {"compare"} and len(rows) == 2 * 2
    page = write(tmp_path / "results", tmp_path / "page.md").read_text()
    base, changed = cells(rows)
    mean, spread = (of(base.by_seed("validation").values()) for of in (statistics.fmean, statistics.stdev))
    assert f"| as it is | {mean:.2f} ± {spread:.2f} | 1.00 |" in page
    fewer = changed.mean("training_macs") / base.mean("training_macs")
    assert f"| rank 1 | {changed.against(base, 'validation')} | {fewer:.2f} |" in page


def recorded(monkeypatch, accuracy=lambda job: 0.5):
    """Let campaigns make up their trainings, and keep a list of those."""
    ran = []

    def finished(pending, jobs):
        for job in pending:
            ran.append(job)
            yield job, {**dict.fromkeys(campaign.MEASURED, 0.5), "validation_accuracy": accuracy(job), "blocks": "4x4"}

    monkeypatch.setattr(campaign, "_finished", finished)
    return ran


@pytest.mark.slow
def test_what_is_done_is_not_run_again(finished, monkeypatch):
    monkeypatch.setattr(campaign, "_finished", lambda pending, jobs: pytest.fail("run again") if pending else ())
    Campaign(TINY, finished / "results", finished / "work", jobs=2).run()


@pytest.mark.slow
def test_what_an_earlier_revision_of_a_method_did_is_run_again(finished, tmp_path, monkeypatch):
    (tmp_path / "reproduce-tiny.json").write_bytes((finished / "results/reproduce-tiny.json").read_bytes())
    monkeypatch.setitem(METHODS, "rigl", dataclasses.replace(spec_of("rigl"), revision=spec_of("rigl").revision + 1))
    assert "since the method changed (see the changelog): `rigl`." in write(tmp_path, tmp_path / "page.md").read_text()
    run_again = recorded(monkeypatch)
    Campaign(TINY, tmp_path, tmp_path / "work", jobs=2).run()
    assert {job.cell.method for job in run_again} == {"rigl"}
    assert [job.part for job in run_again] == ["tune"] * 2 + ["compare"] * 2


@pytest.mark.slow
def test_another_campaign_does_not_go_on_in_the_same_file(finished):
    with pytest.raises(KronblocksError, match="other settings"):
        Campaign(dataclasses.replace(TINY, rates=None), finished / "results", finished / "work", jobs=2)


def test_a_trial_that_diverges_is_never_the_best_and_a_comparison_that_does_is_an_error(tmp_path, monkeypatch, in_this_process):
    def train(config):
        if (config.method == "dense" and config.lr == 8e-3) or (config.method == "rigl" and config.seed == 1):
            raise Diverged("weights are not finite")
        return dict.fromkeys(campaign.MEASURED, 0.5)

    monkeypatch.setattr(campaign, "_train", train)
    study = Campaign(TINY, tmp_path / "results", tmp_path / "work", jobs=1)
    with pytest.raises(KronblocksError, match="rigl-4-0.5-t0-s1-r[0-9]+: weights are not finite"):
        study.run()
    tuned = [row for row in study.results.rows if row["part"] == "tune" and row["method"] == "dense"]
    assert [row["validation_accuracy"] for row in tuned] == [0.5, 0.0]
    assert best_trial(study.results.rows, Cell("dense", "", 0.0), (100,)) == 0


def test_trials_go_on_beyond_the_first_grid_while_the_best_lies_at_an_edge(tmp_path, monkeypatch, in_this_process):
    wanted = {"lr": 3.2e-2, "rank": 4}
    trained = []

    def train(config):
        trained.append((config.lr, config.rank))
        accuracy = 1 - abs(math.log2(config.lr / wanted["lr"])) / 10 - abs(math.log2(config.rank / wanted["rank"])) / 20
        return {**dict.fromkeys(campaign.MEASURED, 0.5), "validation_accuracy": accuracy, "blocks": "4x4"}

    monkeypatch.setattr(campaign, "_train", train)
    study = dataclasses.replace(TINY, methods=("two-phase",), rates=None, seeds=(0,))
    rows = Campaign(study, tmp_path, tmp_path / "work", jobs=1).run().rows
    compared = [row for row in rows if row["part"] == "compare"]
    assert [row["settings"] for row in compared] == ["lr 0.032, rank 4"]
    # six, then 0.016 and rank 2 beside 0.008, then 0.032 and both ranks beside 0.016, then 0.064 and both ranks beside 0.032
    assert len(trained) == 6 + 2 + 3 + 3 + 1 and len(set(trained)) == len(trained) - 1
    page = write(tmp_path, tmp_path / "page.md").read_text()
    assert "| two-phase | 4x4 | lr 0.032, rank 4 | 14 |" in page
    wanted["lr"] = 8e-3  # other trials: what was compared is compared again, at another place
    (tmp_path / "reproduce-tiny.json").unlink()
    campaigned = Campaign(study, tmp_path, tmp_path / "work", jobs=1)
    campaigned.results.add([{**compared[0]}])
    assert [row["settings"] for row in campaigned.run().rows if row["part"] == "compare"] == ["lr 0.008, rank 4"]


def test_a_trial_whose_other_seed_is_missing_gets_it_before_it_is_chosen(tmp_path, monkeypatch):
    """An interrupted campaign, of which one seed of a trial beyond the first grid was done, and a lucky one."""
    study = dataclasses.replace(TINY, methods=("two-phase",), rates=None, seeds=(0,), tuning_seeds=(100, 101))
    beyond = study.space("two-phase").first + 3
    accuracy = {(beyond, 100): 0.9, (beyond, 101): 0.1}
    ran = recorded(monkeypatch, lambda job: accuracy.get((job.trial, job.seed), 0.5))
    campaigned = Campaign(study, tmp_path, tmp_path / "work", jobs=1)
    known = campaign.Job("tune", Cell("two-phase", "4", 0.5), beyond, 100)
    row = {"settings": study.words("two-phase", beyond), "revision": spec_of("two-phase").revision}
    campaigned.results.add([{**known.key(), **row, "validation_accuracy": 0.9}])
    rows = campaigned.run().rows
    assert known._replace(seed=101) in ran and known not in ran
    assert {row["trial"] for row in rows if row["part"] == "compare"} == {0}


def test_rows_of_other_settings_are_run_again_and_those_of_other_cells_stay(tmp_path, monkeypatch):
    chosen = {method: {"lr": 4e-3} for method in ("dense", "two-phase")}
    study = dataclasses.replace(TINY, methods=tuple(chosen), chosen=chosen, seeds=(0,), cells=(("4", 0.5), ("8", 0.5)))
    ran = recorded(monkeypatch)
    Campaign(study, tmp_path, tmp_path / "work", jobs=1).run()
    assert len(ran) == 3
    fewer = dataclasses.replace(study, cells=(("8", 0.5),))
    assert len(Campaign(fewer, tmp_path, tmp_path / "work", jobs=1).run().rows) == 3 and len(ran) == 3
    faster = dataclasses.replace(study, chosen={**chosen, "two-phase": {"lr": 8e-3}})
    rows = Campaign(faster, tmp_path, tmp_path / "work", jobs=1).run().rows
    assert [job.cell.method for job in ran[3:]] == ["two-phase"] * 2 and len(rows) == 3
    variants = dataclasses.replace(study, methods=("two-phase",), chosen=None, variants={"as it is": {}}, name="varied")
    Campaign(variants, tmp_path, tmp_path / "work", jobs=1).run()
    with pytest.raises(KronblocksError, match=r"other settings \(variants\)"):
        Campaign(dataclasses.replace(variants, variants={"as it is": {"rank": 1}}), tmp_path, tmp_path / "work", jobs=1)


@pytest.mark.slow
def test_a_working_folder_of_other_settings_is_begun_anew(tmp_path):
    study = dataclasses.replace(TINY, epochs=1)
    config = study.training(Cell("two-phase", "4", 0.5), {"lr": 4e-3}, 0, tmp_path / "run")
    campaign._train(config)
    (tmp_path / "run/left").touch()
    campaign._train(config)
    assert (tmp_path / "run/left").exists()
    campaign._train(dataclasses.replace(config, lr=8e-3))
    assert not (tmp_path / "run/left").exists() and '"lr": 0.008' in (tmp_path / "run/config.json").read_text()


@pytest.mark.slow
def test_page(finished, tmp_path, monkeypatch, capsys):
    page = write(finished / "results", tmp_path / "experiments.md").read_text()
    rows = read(finished / "results/reproduce-tiny.json")["rows"]
    found = {cell.method: cell for cell in cells(rows)}
    assert f"| {found['rigl'].spread_of()} |" in page
    assert str(found["two-phase"].against(found["dense"])) in page
    assert "Effective block sizes: 2x4 4x4." in page and "### 50% zeros, 4x4 blocks" in page
    main(["reproduce", "tables", "--out", str(finished / "results"), "--page", str(tmp_path / "again.md")])
    assert (tmp_path / "again.md").read_text() == page and "again.md" in capsys.readouterr().out
    with pytest.raises(KronblocksError, match=r"no reproduce-\*\.json"):
        write(tmp_path, tmp_path / "none.md")


@pytest.mark.slow
def test_what_is_written_by_hand_stays(finished, tmp_path):
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    table = write(finished / "results", other).read_text().split("## tiny\n\n")[1]
    by_hand = "# Mine\n\nBefore.\n\n{}\nAfter.\n"
    page.write_text(by_hand.format("<!-- begin table: tiny -->\nold\n<!-- end table: tiny -->\n"))
    assert write(finished / "results", page).read_text() == by_hand.format(table)
    assert write(finished / "results", page).read_text() == by_hand.format(table)


@pytest.mark.slow
def test_the_short_table_and_the_picture(finished, tmp_path):
    rows = read(finished / "results/reproduce-tiny.json")["rows"]
    found = {cell.method: cell for cell in cells(rows)}
    table = "\n".join(summary(finished / "results", "tiny", ("4",), 0.5))
    best = max((found["two-phase"], found["rigl"]), key=lambda cell: cell.quality)
    assert f"**{best.spread_of()}**" in table and table.count("**") == 2
    assert str(found["two-phase"].against(found["dense"])) in table and "2 seeds" in table
    with pytest.raises(KronblocksError, match="two-phase was not run with blocks of 8 at 50%"):
        summary(finished / "results", "tiny", ("8",), 0.5)
    several = [CellResult([{**row, "sparsity": s} for row in found["rigl"].rows], []) for s in (0.5, 0.9)]
    draw([found["dense"], *several], tmp_path / "figures" / "picture.png", "a title")
    assert (tmp_path / "figures/picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_block_size_can_take_the_settings_of_another():
    study = dataclasses.replace(TINY, cells=(("2", 0.5), ("4", 0.5), ("4", 0.9)), tuned_as={"2": "4"})
    assert {(cell.method, cell.block) for cell in study.tuned()} == {("dense", ""), ("two-phase", "4"), ("rigl", "4")}
    assert study.tuned_for(Cell("rigl", "2", 0.5)) == Cell("rigl", "4", study.tuned_at)
    assert {study.tuned_for(cell) for cell in study.table()} == set(study.tuned())


@pytest.mark.slow
def test_settings_may_come_from_another_study_and_single_weights_have_no_factors(tmp_path, in_this_process):
    chosen = {method: {"lr": 4e-3} for method in ("dense", "two-phase", "magnitude")}
    study = dataclasses.replace(
        TINY, methods=tuple(chosen), cells=(("1", 0.5), ("4", 0.5)), chosen=chosen, seeds=(0,), tuning_seeds=(), epochs=1
    )
    assert study.tuned() == [] and study.settings("magnitude", 0) == {"lr": 4e-3}
    assert [(cell.method, cell.block) for cell in study.table()] == [
        *(("dense", ""), ("magnitude", "1"), ("two-phase", "4"), ("magnitude", "4")),
    ]
    Campaign(study, tmp_path, tmp_path / "work", jobs=2).run()
    page = write(tmp_path, tmp_path / "page.md").read_text()
    assert "### 50% zeros, 1x1 blocks" in page and "### 50% zeros, 4x4 blocks" in page and "Not finished" not in page
    assert "Settings, not tuned in this study: dense lr 0.004; two-phase lr 0.004; magnitude lr 0.004." in page


def test_every_method_has_as_many_trials_and_every_training_of_the_studies_can_be(tmp_path):
    assert {space_of(method).first for method in studies.METHODS} == {6}
    for study in STUDIES.values():
        for cell in {*study.tuned(), *study.table()}:
            one = study.chosen is not None or study.lr is not None
            numbers = 1 if one else len(study.variants or study.space(cell.method))
            for number in range(numbers):
                assert study.words(cell.method, number)
                study.training(cell, study.settings(cell.method, number), 0, tmp_path)


@pytest.mark.slow
def test_a_study_of_ones_own(tmp_path, capsys, monkeypatch, in_this_process):
    words = "reproduce mlp --name mine --data digits --methods magnitude --block-sizes 8 --sparsities 0.5 --seeds 7 --epochs 1"
    config = ReproduceConfig(
        what="mlp", name="mine", data="digits", methods=("magnitude",), block_sizes=("8", "16x4"), sparsities=(0.5, 0.75)
    )
    (study,) = config.studies()
    assert study.methods == ("dense", "magnitude") and study.tuned_at == 0.5 and study.widths == (512, 256)
    assert study.cells == (("8", 0.5), ("16x4", 0.5), ("8", 0.75), ("16x4", 0.75))
    twice = dataclasses.replace(config, block_sizes=("4", "4x4"), sparsities=(0.5, 0.5))
    assert twice.studies()[0].cells == (("4", 0.5),)
    assert ReproduceConfig(what="vit-tiny", name="mine", seeds=(7,)).studies()[0].tuned()  # not at one rate for all methods
    monkeypatch.setattr(Study, "space", lambda self, method: Space([rates((4e-3,), slice(0, 1))]))  # one trial
    main([*words.split(), "--out", str(tmp_path), "--work", str(tmp_path / "work")])
    rows = read(tmp_path / "reproduce-mine.json")["rows"]
    assert {row["seed"] for row in rows if row["part"] == "compare"} == {7}
    assert {row["blocks"] for row in rows if row["method"] == "magnitude"} == {"2x8 8x8"} and "2x8 8x8" in capsys.readouterr().out
    assert "### 50% zeros, 8x8 blocks" in write(tmp_path, tmp_path / "page.md").read_text()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"what": "mlp", "data": "digits"}, "add --name"),
        ({"what": "all", "data": "digits", "name": "mine"}, "name a model"),
        ({"what": "mlp", "name": "mine"}, "say what is other"),
        ({"what": "mlp", "name": "lenet5-mnist5k", "epochs": 2}, "study of the docs"),
        ({"what": "mlp", "name": "mine", "seeds": (100,)}, "those of the trials"),
        ({"what": "mlp", "name": "mine", "sparsities": (1.5,)}, "sparsity"),
        ({"what": "mlp", "name": "mine", "block_sizes": ("four",)}, "block size"),
        ({"what": "mlp", "name": "mine", "block_sizes": ()}, "--block-sizes names nothing"),
        ({"what": "mlp", "name": "mine", "seeds": ()}, "--seeds names nothing"),
        ({"what": "mlp", "name": "mine", "block_sizes": ("1",), "methods": ("two-phase",)}, "blocks of 1: name other methods"),
        ({"what": "mlp", "name": "mine", "methods": ("dense",)}, "name other methods"),
        ({"what": "mlp", "name": "../mine", "epochs": 2}, "--name becomes part of a file's name"),
        ({"what": "mlp", "name": "", "epochs": 2}, "--name becomes part of a file's name"),
    ],
)
def test_a_study_of_ones_own_that_cannot_be_is_refused(settings, says):
    with pytest.raises(KronblocksError, match=says):
        ReproduceConfig(**settings).studies()


def test_the_best_trial_is_chosen_by_its_mean_and_the_first_of_equals():
    cell = Cell("rigl", "4", 0.9)

    def row(trial, seed, accuracy, part="tune"):
        key = {"part": part, "method": "rigl", "block": "4", "sparsity": 0.9, "trial": trial, "seed": seed}
        return {**key, "validation_accuracy": accuracy}

    rows = [row(0, 1, 0.5), row(0, 2, 0.7), row(1, 1, 0.9), row(1, 2, 0.5)]
    assert best_trial([*rows, row(0, 1, 1.0, part="compare"), row(0, 3, 1.0)], cell, (1, 2)) == 1
    assert best_trial([row(0, 1, 0.5), row(1, 1, 0.5)], cell, (1, 2)) == 0


def test_paired_differences_and_their_interval():
    difference = paired([2.0, 3.0, 5.0], [1.0, 1.0, 1.0])
    assert difference.mean == pytest.approx(7 / 3)
    # Student's t with two degrees of freedom: 4.3027, standard deviation of 1, 2, 4 over the root of 3
    half = 4.30265 * math.sqrt(7 / 3) / math.sqrt(3)
    assert difference.low == pytest.approx(7 / 3 - half, rel=1e-4) and difference.high == pytest.approx(7 / 3 + half, rel=1e-4)
    assert paired([1.0], [0.0]).low == -math.inf


@pytest.mark.slow
def test_searches_beside_trainings_of_every_size(tmp_path, monkeypatch):
    task = {"data": "digits", "model": "mlp", "widths": (16,), "epochs": 2, "batch_size": 8, "sparsity": 0.5}
    study = SearchStudy({"digits": task}, sizes=("2", "4"), seeds=(0,), threads=1)
    results = study.run(tmp_path / "results", tmp_path / "work")
    searches = [(part, "auto") for part in ("search", "removal", "penalty")]
    assert [(row["part"], row["size"]) for row in results.rows] == [("apart", "2"), ("apart", "4"), *searches]
    assert {row["found"] for row in results.rows[2:]} <= {"2x2", "4x4"} and results.rows[1]["blocks"] == "2x4 4x4"
    monkeypatch.setattr(SearchStudy, "_search", lambda self, key: pytest.fail("run again"))
    study.run(tmp_path / "results", tmp_path / "work")
    assert "## Search" in (write(tmp_path / "results", tmp_path / "page.md")).read_text()


def test_what_a_search_should_have_found():
    def row(size, seed, accuracy, seconds):
        key = {"part": "apart", "task": "a task", "size": size, "seed": seed, "blocks": f"{size}x{size}"}
        return {**key, "test_accuracy": accuracy, "seconds": seconds}

    def text_of(*apart):
        search = {"part": "search", "task": "a task", "size": "auto", "seed": 0, "found": "4x4", "seconds": 5}
        rows = [*(row(*each) for each in apart), search, {**search, "part": "removal", "found": "2x2", "seconds": 2}]
        return "\n".join(searches_page({"versions": {"processor": "a", "torch": "b"}, "rows": rows}))

    eight = (("8", 0, 0.8, 1), ("8", 1, 0.8, 1))
    text = text_of(("2", 0, 0.91, 9), ("2", 1, 0.87, 9), ("4", 0, 0.889, 4), ("4", 1, 0.889, 4), *eight)
    assert "| 2x2 | 2x2 | 89.00 ± 2.83 |  | yes | 9.0 | 0 of 1 | 1 of 1 |" in text
    assert "| **4x4** | 4x4 | 88.90 ± 0.00 | -0.10 | yes | 4.0 | 1 of 1 | 0 of 1 |" in text
    assert "| 8x8 | 8x8 | 80.00 ± 0.00 | -9.00 | no | 1.0 | 0 of 1 | 0 of 1 |" in text
    assert "The pooled deviation is 1.63; by that of 2x2 alone, 2.83, the size to find would be 4x4 too." in text
    assert "A search took 5.0 s by halving, 2.0 s by removal: 1.25, 0.50 of a training with 4x4 blocks." in text
    text = text_of(("2", 0, 0.891, 9), ("2", 1, 0.889, 9), ("4", 0, 0.91, 4), ("4", 1, 0.866, 4), *eight)
    assert "| **4x4** |" in text and "by that of 2x2 alone, 0.14, the size to find would be 2x2." in text


def test_names_of_the_command_are_studies():
    assert {*ReproduceConfig(what="all").names, *ReproduceConfig(what="all", full=True).names} == set(studies.STUDIES)
    assert ReproduceConfig(what="vit-tiny").names == ("vit-tiny-fashion", "vit-tiny-fashion-tuned", "vit-tiny-factor-rates")
    assert ReproduceConfig(what="vit-tiny", full=True).names == ("vit-tiny-cifar100",)
    for settings, says in (
        ({"what": "vit-base"}, "add --full"),
        ({"what": "mlp", "full": True}, "leave --full out"),
        ({"what": "mlp", "jobs": 0}, "--jobs"),
    ):
        with pytest.raises(KronblocksError, match=says):
            ReproduceConfig(**settings)
