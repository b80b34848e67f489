"""All commands on tiny sizes: what they write, that they go on where they were, what they refuse, and the page."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch

from kronblocks.ops.backends import backend_key
from kronblocks_lab.__main__ import main
from kronblocks_lab.bench import ops, whole_model
from kronblocks_lab.bench import step as steps
from kronblocks_lab.bench import train as trainings
from kronblocks_lab.bench.cases import grid as grids
from kronblocks_lab.bench.cases import peers
from kronblocks_lab.bench.cases.grids import Group, InferSettings, OpsSettings
from kronblocks_lab.bench.cases.models import step_models
from kronblocks_lab.bench.measure.results import read
from kronblocks_lab.bench.settings import StepSettings
from kronblocks_lab.bench.train import TrainSettings
from kronblocks_lab.training.train import train

pytestmark = pytest.mark.slow

TINY = "--quick --threads 1 --seconds 1e-4 --repeats 2"
GRID = "--shapes 64x128 --blocks 8 8x16 --densities 0.1 1 --rows 1 20"


@pytest.fixture(autouse=True, scope="module")
def without_fastkron():
    """It would bring a second OpenMP runtime into the tests' process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "has_fastkron", lambda: False)
        yield


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The files of all benchmarks, each run once; the trainings in this process, and no C++ compiled, which is faster."""
    folder, compiled = tmp_path_factory.mktemp("results"), torch.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda run, dynamic: compiled(run, dynamic=dynamic, backend="aot_eager"))
        patch.setattr(trainings, "train_apart", train)
        patch.setattr(whole_model, "alone", lambda device, function, *arguments: function(*arguments))
        for line in (
            f"ops {TINY} {GRID}",
            f"infer {TINY} {GRID}",
            f"step {TINY} --rows 16 --width 64 --cases r=1 90% --loss-steps 2 --no-memory",
            f"step {TINY} --authors --rows 16 --width 64 --cases 2x2 --no-memory",
            f"ops {TINY} --large --dtype bf16 --compiled --shapes 64x64 --blocks 8 --densities 1 --rows 16 --ranks 2",
            f"step {TINY} --dtype bf16 --rows 16 --width 64 --no-memory",
            f"step {TINY} --rows 16 --width 64 --cases r=1 --no-memory --label other",
            f"deploy {TINY} --rows 16 --width 64 --layers 1 --blocks 8 --label other",
            f"model {TINY} --image-size 32",
            f"deploy {TINY} --rows 16 --width 64 --layers 2 --blocks 4 8",
            f"train --quick --threads 1 --data digits --widths 32 --block-size 8 --epochs 1 --work {folder / 'runs'}",
        ):
            main(["bench", *line.split(), "--out", str(folder)])
    return folder


def test_ops_rows(results):
    data = read(results / "bench-ops.json")
    rows = data["rows"]
    assert {(row["block"], row["density"], row["rows"]) for row in rows} == {
        (block, density, count) for block in ("8x8", "8x16") for density in (0.1, 1.0) for count in (1, 20)
    }
    place = {"shape": "64x128", "block": "8x8", "density": 0.1, "rows": 20}
    here = [row for row in rows if all(row[name] == value for name, value in place.items())]
    forward = {row["case"]: row for row in here if row["direction"] == "forward"}
    both = {row["case"]: row for row in here if row["direction"] == "forward+backward"}
    assert {"dense", "values packed", "values auto", "torch BSR F.linear", "torch BSR W @ x.T", "SciPy BSR"} <= forward.keys()
    assert {"factors r=1 tile_first", "factors r=4 per-row coeff_first", "factors r=4 packed", "factors r=1 auto"} <= both.keys()
    assert "SciPy BSR" not in both
    assert not any(row["direction"] == "forward+backward" for row in rows if row["rows"] == 1)
    whole = {row["case"] for row in rows if row["density"] == 1}
    assert {"authors build W r=1", "authors two products r=4"} <= whole and "factors r=4 packed" not in whole
    packed = forward["values packed"]
    assert packed["relative_macs"] == pytest.approx(13 / 128, rel=1e-3) and packed["macs_bound"] == pytest.approx(
        128 / 13, rel=1e-3
    )
    assert packed["gflops"] == pytest.approx(2 * 20 * 13 * 64 / packed["ms"] / 1e6, rel=1e-2)
    for row in rows:
        assert row["ms_low"] <= row["ms"] <= row["ms_high"] and row["speed_low"] <= row["speed"] <= row["speed_high"]
        assert row["speed"] == pytest.approx(row["dense_ms"] / row["ms"], rel=2e-3)
    assert forward["dense"]["speed"] == 1
    assert data["settings"]["threads"] == 1 and data["machine"]["product_gflops"] > 0
    assert data["skipped"]["pyfastkron"] == "it is not installed" and "square" in data["skipped"]["torch BSR F.linear"]


def test_deploy_rows(results):
    rows = {row["case"]: row for row in read(results / "bench-deploy.json")["rows"]}
    dense, packed = rows["dense"], rows["exported, 90% zeros, 8x8"]
    assert dense["speed"] == 1 and dense["bytes"] == 4 * (2 * (64 * 64 + 64) + 10 * 64 + 10)
    assert "exported, 90% zeros, 4x4" in rows and all(
        0 <= row["error"] < 1e-5 for name, row in rows.items() if "int8" not in name
    )
    assert packed["forms"] and packed["bytes"] <= dense["bytes"]
    assert packed["speed"] == pytest.approx(dense["ms"] / packed["ms"], rel=2e-3)


def test_the_authors_benchmark(results):
    rows = {row["case"]: row for row in read(results / "bench-step-authors.json")["rows"]}
    forms = ("authors build W", "authors two products", "authors loop", "factors")
    ends = {"factors": (" tile_first", " coeff_first", " auto")}
    expected = {f"{form} r={rank} 2x2{end}" for form in forms for rank in (1, 2, 4) for end in ends.get(form, ("",))}
    assert expected | {"dense"} == rows.keys()
    full = StepSettings(authors=True, compiled=True, device="cuda", dtype="tf32", graphs=True)
    assert full.batches == (256, 20_000) and full.path.name == "bench-step-authors-cuda-tf32-graphs.json"
    names = [model.name for model in step_models(full)]
    assert len(names) == len(set(names)) == 2 * (2 + 3 * 9) + 3 * 9
    assert {"dense, compiled", "authors loop r=4 8x8, compiled", "factors r=2 4x4 auto"} <= set(names)


def test_other_precisions_and_compiled_peers(results):
    data = read(results / "bench-ops-large-bf16.json")
    assert data["settings"]["dtype"] == "bfloat16" and data["settings"]["compiled"]
    assert data["machine"]["backend"] == backend_key("cpu", torch.bfloat16)
    both = {row["case"] for row in data["rows"] if row["direction"] == "forward+backward"}
    assert {"dense, compiled", "authors build W r=2, compiled", "authors loop r=2", "factors r=2 tile_first"} <= both
    assert "SciPy BSR" not in {row["case"] for row in data["rows"]}
    large = OpsSettings(large=True, device="cuda", dtype="bf16")
    assert large.path.name == "bench-ops-large-cuda-bf16.json" and large.all_ranks == (1, 4, 8)
    assert {group.shape for group in large.groups()} == {(4096, 4096), (4096, 16384)}
    assert {group.rows for group in large.groups()} == {256, 20_000} and len(large.groups()) == 2 * 2 * 4 * 5
    step = read(results / "bench-step-bf16.json")
    assert all(row["speed"] > 0 for row in step["rows"]) and step["settings"]["dtype"] == "bfloat16"


def test_a_peer_that_cannot_is_left_out_with_its_reason():
    def refuses(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel for BFloat16\nmore")

    with pytest.raises(peers.Unavailable, match="^no kernel for BFloat16$"):
        peers.tried(refuses, torch.zeros(1))


def test_model_rows(results):
    data = read(results / "bench-model-vit-tiny.json")
    rows = {(row["direction"], row["case"]): row for row in data["rows"]}
    dense, lifted = (rows["training step", case] for case in (whole_model.DENSE, whole_model.BLOCKS))
    factors, exported = rows["training step", whole_model.FACTORS], rows["inference", "exported"]
    assert lifted["parameters"] < 0.15 * dense["parameters"] < factors["parameters"] < dense["parameters"]
    assert exported["parameters"] <= rows["inference", "dense"]["parameters"]  # which forms are quickest hangs on the machine
    for row in rows.values():
        assert row["images_per_second"] == pytest.approx(2e3 / row["ms"], rel=2e-3)
        assert row["speed"] == pytest.approx(row["dense_ms"] / row["ms"], rel=2e-3)
        assert row["direction"] == "inference" or (row["peak_bytes"] > 0 and row["first_loss"] > 0)


@pytest.mark.parametrize("wrong", ["--device cuda", "--rows 0", "--blocks 7", "--sparsity 1", "--layers 0"])
def test_deploy_refuses(wrong, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["bench", "deploy", *wrong.split(), "--out", str(tmp_path)])
    assert "Traceback" not in capsys.readouterr().err


def test_auto_is_the_time_of_the_plan_that_it_chose(results):
    for kind in ("ops", "infer"):
        rows = read(results / f"bench-{kind}.json")["rows"]
        index = {tuple(row[name] for name in grids.KEY): row for row in rows}
        autos = [row for row in rows if row["case"].endswith(" auto")]
        assert autos
        for auto in autos:
            case = f"{auto['case'].removesuffix('auto')}{auto['plan']}" if auto["plan"] else "dense"
            fixed = index[tuple({**auto, "case": case}[name] for name in grids.KEY)]
            assert {**fixed, "case": auto["case"]} == auto


def test_step_rows(results):
    rows = {row["case"]: row for row in read(results / "bench-step.json")["rows"]}
    assert {"dense", "factors r=1 8x8 tile_first", "authors two products r=1 16x16", "packed 90% 64x64"} <= rows.keys()
    auto = rows["factors r=1 8x8 auto"]
    twin = rows.get(f"factors r=1 8x8 {auto['plan']}", auto)  # timed under its own name where no case has the plan it chose
    assert auto["ms"] == twin["ms"]
    assert rows["dense"]["parameters"] == 2 * (64 * 64 + 64) + 650
    assert rows["packed 90% 16x16"]["parameters"] == 2 * (2 * 256 + 64) + 650


def test_train_rows(results):
    data = read(results / "bench-train.json")
    assert [(row["method"], row["seed"]) for row in data["rows"]] == [("dense", 0), ("two-phase", 0)]
    assert data["rows"][1]["block_sparsity"] >= 0.9 and all(row["train_seconds"] > 0 for row in data["rows"])
    assert data["settings"]["data"] == "digits" and data["settings"]["epochs"] == 1


def test_memory_and_losses_come_from_a_process_of_its_own(tmp_path):
    settings = StepSettings(out=tmp_path, quick=True, threads=1, rows=(16,), width=64, loss_steps=2)
    found = steps.alone("cpu", steps.train_some, "dense", settings, 16)
    assert found["peak_bytes"] >= 0 and found["last_loss"] < found["first_loss"]


def test_choices_are_made_anew_and_measurements_stay(results, tmp_path, monkeypatch):
    shutil.copy(results / "bench-ops.json", tmp_path)
    before = read(tmp_path / "bench-ops.json")["rows"]
    monkeypatch.setattr(ops, "auto_plan_", lambda layer, rows, training: "packed" if layer.rank is None else "dense")
    monkeypatch.setattr(grids, "measure", lambda *args, **settings: pytest.fail("measured again"))
    main(["bench", *f"ops {TINY} {GRID} --choices".split(), "--out", str(tmp_path)])
    after = read(tmp_path / "bench-ops.json")["rows"]
    fixed = [row for row in before if not row["case"].endswith(" auto")]
    assert [row for row in after if not row["case"].endswith(" auto")] == fixed
    autos = [row for row in after if row["case"].endswith(" auto")]
    assert len(autos) == len(before) - len(fixed) > 0
    for row in autos:
        name = row["case"].removesuffix("auto") + ("packed" if row["case"].startswith("values") else "dense")
        place = ("shape", "block", "density", "rows", "direction")
        twin = [each for each in fixed if each["case"] == name and all(each[k] == row[k] for k in place)]
        assert not twin or row == {**twin[0], "case": row["case"]}  # not every plan is measured everywhere


def test_finished_groups_are_not_measured_again(results, monkeypatch):
    before = (results / "bench-ops.json").read_text()
    monkeypatch.setattr(grids, "measure", lambda *args, **settings: pytest.fail("measured again"))
    monkeypatch.setattr(steps, "measure", lambda *args, **settings: pytest.fail("measured again"))
    main(["bench", "ops", *TINY.split(), *GRID.split(), "--out", str(results)])
    main(["bench", *f"step {TINY} --rows 16 --width 64 --cases 90% --loss-steps 2".split(), "--out", str(results)])
    assert (results / "bench-ops.json").read_text() == before


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch, capsys):
    line = ["bench", "infer", *TINY.split(), "--shapes", "64x64", "--rows", "1", "2", "3", "--out", str(tmp_path)]
    measure, calls = grids.measure, []

    def interrupted(*args, **settings):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*args, **settings)

    monkeypatch.setattr(grids, "measure", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main(line)
    assert stopped.value.code == 130 and "the same command goes on" in capsys.readouterr().err
    first = read(tmp_path / "bench-infer.json")["rows"]
    assert {row["rows"] for row in first} == {1}
    main(line)
    rows = read(tmp_path / "bench-infer.json")["rows"]
    assert {row["rows"] for row in rows} == {1, 2, 3} and rows[: len(first)] == first and len(calls) == 4


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("ops --threads 0", "--threads must be at least 1"),
        ("ops --seconds 0", "--seconds"),
        ("ops --repeats 0", "--repeats"),
        ("ops --shapes 64", "--shapes are written"),
        ("ops --shapes 10x10 --blocks 4", "does not divide"),
        ("ops --densities 1.5", "--densities"),
        ("infer --rows 0", "--rows"),
        ("infer --rank 0", "--rank"),
        ("ops --ranks 0", "--ranks"),
        ("step --width 100", "--width"),
        ("step --rows 0", "--rows"),
        ("step --loss-steps 0", "--loss-steps"),
        ("step --quick --cases nothing", "part of no case"),
        ("step --graphs", "--graphs is for a GPU"),
        ("step --label a/b", "--label becomes part of a file's name"),
        ("ops --dtype tf32", "--dtype tf32 is for a GPU"),
        ("model --batch-size 0", "--batch-size"),
        ("model --block-size x", "block size"),
        ("model --graphs --device cuda", "leave --graphs out"),
        ("deploy --dtype bf16", "in fp32"),
        ("train --epochs 0", "--epochs"),
        ("train --block-size x", "block size"),
        ("tables --results . --page /dev/null/page.md", "cannot write"),
    ],
)
def test_bad_options_are_refused(tmp_path, monkeypatch, capsys, line, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *line.split()])
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert says in re.sub(r"[\s│]+", " ", printed.err + printed.out)
    assert list(tmp_path.iterdir()) == []


def test_another_machines_times_are_not_joined(results, tmp_path, monkeypatch, capsys):
    shutil.copy(results / "bench-step.json", tmp_path)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "ANOTHER 1")
    line = f"step {TINY} --rows 16 --width 64 --cases r=1 90% --loss-steps 2 --no-memory"
    with pytest.raises(SystemExit):
        main(["bench", *line.split(), "--out", str(tmp_path)])
    assert "write --label ANOTHER-1" in re.sub(r"[\s│]+", " ", capsys.readouterr().err)


def test_a_gpu_that_is_not_there_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for kind in ("ops", "infer", "step", "model"):
        with pytest.raises(SystemExit):
            main(["bench", kind, "--quick", "--device", "cuda", "--out", str(tmp_path)])
        assert "sees no GPU" in capsys.readouterr().err


def test_the_page_holds_every_part(results, tmp_path):
    page = tmp_path / "docs" / "benchmarks.md"
    main(["bench", "tables", "--results", str(results), "--page", str(page)])
    text = page.read_text()
    for title in ("# Benchmarks", "## A training step", "## Whole trainings", "## Inference", "roofline"):
        assert title in text
    assert "### 64x128: free values, packed" in text and "### 64x128: factors, best plan" in text and "A quick run" in text
    assert [name for name in re.findall(r"\]\((figures/[^)]+)\)", text) if not (page.parent / name).exists()] == []
    assert (page.parent / "figures" / "bench-step.png").read_bytes().startswith(b"\x89PNG")
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert tables and all(len({line.count(" | ") for line in table.splitlines()}) == 1 for table in tables)
    main(["bench", "tables", "--results", str(results), "--page", str(page)])
    assert page.read_text() == text


def test_the_page_holds_what_stands_beside(results, tmp_path):
    """Other precisions, the authors' benchmark and whole models; and what a GPU's file has more: peak memory, skipped cases."""
    data = json.loads((results / "bench-ops-large-bf16.json").read_text())
    data["columns"].append("peak_bytes")
    for number, row in enumerate(data["rows"]):
        row.append(2**20 * (1 + number))
    data["settings"] |= {"device": "cuda", "graphs": True}
    data["skipped"] = {"torch BSR F.linear": "no CUDA graph: it reads back"}
    data["machine"] |= {"kind": "a GPU", "backend": "triton 3.9.0"}
    (tmp_path / "bench-ops-large-cuda-bf16-graphs.json").write_text(json.dumps(data))
    for name in ("step-authors", "step-bf16", "step-other", "deploy-other", "model-vit-tiny"):
        shutil.copy(results / f"bench-{name}.json", tmp_path)
    page = tmp_path / "benchmarks.md"
    main(["bench", "tables", "--results", str(tmp_path), "--page", str(page)])
    text = page.read_text()
    for title in ("Training steps: step-authors", "Training steps: step-bf16", "A whole model: model-vit-tiny"):
        assert f"## {title}\n" in text
    assert "## Training steps: step-other\n" in text and "## A whole exported model: deploy-other\n" in text
    summary = text.partition("## Summary")[2].partition("\n## ")[0]
    assert summary.count("training step, factors r=1 8x8, 16 rows | dense fp32 |") == 1  # neither bf16 nor the authors' grid
    assert "ratio to dense bf16" in text.partition("## Training steps: step-bf16")[2].partition("\n## ")[0]
    part = text.partition("## One layer: ops-large-cuda-bf16-graphs")[2].partition("\n## ")[0]
    assert "a GPU" in part and "device cuda, bfloat16, every case a CUDA graph" in part and "computed by triton 3.9.0" in part
    assert "no CUDA graph: it reads back" in part and "MiB" in part and "reached" in part
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert tables and all(len({line.count(" | ") for line in table.splitlines()}) == 1 for table in tables)
    assert "authors loop r=4 2x2" in text and "two-phase, after the lift (live blocks)" in text


def test_the_page_leaves_out_what_was_not_measured(results, tmp_path):
    (tmp_path / "bench-train.json").write_text((results / "bench-train.json").read_text())
    page = tmp_path / "docs" / "benchmarks.md"
    main(["bench", "tables", "--results", str(tmp_path), "--page", str(page)])
    text = page.read_text()
    assert "## Whole trainings" in text and "whole training, two-phase" in text
    assert not any(title in text for title in ("## A training step", "## One layer", "## Inference"))


def test_the_winner_is_bold(results, tmp_path):
    data = json.loads((results / "bench-infer.json").read_text())
    place = {name: data["columns"].index(name) for name in ("case", "speed", "block", "density", "rows")}
    for row in data["rows"]:
        row[place["speed"]] = {"dense": 1.0, "values packed": 2.5, "SciPy BSR": 7.25 if row[place["rows"]] == 1 else 0.5}.get(
            row[place["case"]], 0.5
        )
    (tmp_path / "bench-infer.json").write_text(json.dumps(data))
    page = tmp_path / "benchmarks.md"
    main(["bench", "tables", "--results", str(tmp_path), "--page", str(page)])
    line = next(line for line in page.read_text().splitlines() if line.startswith("| 8x8 | 0.1 |"))
    assert "| 2.50; **SciPy BSR 7.25** |" in line and "| **2.50** |" in line and "**dense**" in line


def test_the_grids_are_the_ones_of_the_docs():
    ops, infer = OpsSettings().groups(), InferSettings().groups()
    shapes = {group.shape for group in ops}
    assert shapes == {(1024, 1024), (4096, 1024), (1024, 4096), (768, 3072), (192, 768)}
    assert len(ops) == 5 * 7 * 5 * 4 + 2 * 3 * 2 + 5 * 7 * 4 and len(set(ops)) == len(ops)
    assert {group.shape for group in ops if group.rows == 20_000} == {(1024, 1024), (192, 768)}
    assert [group.second_pass for group in ops] == sorted(group.second_pass for group in ops)
    assert len(infer) == 5 * 4 * 4 * 4 + 2 and Group((4096, 4096), infer[-1].block, 0.1, 1) in infer


def test_trainings_take_turns():
    runs = TrainSettings(seeds=(3, 4), methods=("two-phase",)).trainings("digits")
    assert [(run.method, run.seed) for run in runs] == [("dense", 3), ("two-phase", 3), ("two-phase", 4), ("dense", 4)]
    assert len({run.out for run in runs}) == 4 and all(run.threads == 2 for run in runs)
    everything = TrainSettings(seeds=(3, 4)).trainings("digits")
    assert len({(run.method, run.seed) for run in everything}) == len(everything) == 18
