"""The main job, on the digits that come with scikit-learn: results, resuming, refusals."""

from __future__ import annotations

import dataclasses
import html
import json
from pathlib import Path

import pytest
import torch

from kronblocks import KronblocksError, PenaltyConfig, ScheduleConfig, from_pretrained
from kronblocks.config.methods import METHODS, spec_of
from kronblocks_lab.__main__ import main
from kronblocks_lab.commands import compare
from kronblocks_lab.report.page import write_report
from kronblocks_lab.report.results import find_runs
from kronblocks_lab.training import train as training
from kronblocks_lab.training.models import build_model
from kronblocks_lab.training.settings import CompareConfig, TrainConfig

TIMES = {"train_seconds", "peak_memory_bytes", "peak_memory_exact", "clock"}


def config(out: Path, **settings) -> TrainConfig:
    defaults = {"data": "digits", "block_size": "8", "epochs": 4, "progress": False, "threads": 1}
    if spec_of(settings.get("method", "two-phase")).is_factored:
        defaults["rank"] = 2
    if settings.get("model", "mlp") == "mlp":
        defaults["widths"] = (64, 32)
    return TrainConfig(**{"out": out, "batch_size": 64, **defaults, **settings})


def lasting(result: dict) -> dict:
    """What must not depend on the clock; the history and evaluations without their seconds."""
    kept = {name: value for name, value in result.items() if name not in TIMES}
    for name in ("history", "evaluations"):
        kept[name] = [{k: v for k, v in each.items() if k not in ("seconds", "cpu_seconds")} for each in result[name]]
    return kept


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["two-phase", "kron-l1", "group-lasso", "elastic-group-lasso", "rigl", "iterative", "magnitude", "static", "dense"]
)
def test_every_method_trains_and_tells_the_truth(tmp_path, method):
    result = training.train(config(tmp_path / "run", method=method))
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == json.loads(json.dumps(result))
    model = from_pretrained(tmp_path / "run" / "model", build_model("mlp", (1, 8, 8), 10, (64, 32)))
    live = total = zero = 0
    for layer, (rows, cols) in zip((model[1], model[3], model[5]), ((8, 8), (8, 8), (2, 8)), strict=True):
        weight = layer.weight.detach()
        blocks = weight.view(weight.shape[0] // rows, rows, -1, cols).transpose(1, 2).abs().amax((2, 3))
        live, total = live + int((blocks > 0).sum()), total + blocks.numel()
        zero += int((blocks == 0).sum()) * rows * cols
    assert (result["live_blocks"], result["total_blocks"]) == (live, total)
    weights = 64 * 64 + 64 * 32 + 32 * 10
    assert result["block_sparsity"] == pytest.approx(zero / weights, abs=1e-12)
    if method == "dense":
        assert zero == 0
    else:
        assert 0.9 <= zero / weights < 0.9 + 64 / weights  # no block more than needed
    # LASSO would need more than these 84 steps to shrink and to recover, and a dozen random blocks may not connect
    if method not in ("group-lasso", "elastic-group-lasso", "static"):
        assert result["test_accuracy"] > 0.15  # chance is 0.1
    assert result["trainable_parameters_max"] >= max(result["trainable_parameters_start"], result["trainable_parameters_end"])
    assert result["bytes"].keys() == {"parameters", "gradients", "optimizer_state", "saved_tensors"}
    assert all(value > 0 for value in result["bytes"].values())
    assert len(result["history"]) == 4 and result["train_seconds"] > 0
    assert list((tmp_path / "run" / "checkpoints").iterdir()) and list((tmp_path / "run").glob("csv/*/metrics.csv"))
    assert list((tmp_path / "run").glob("tensorboard/*/events*"))


@pytest.mark.slow
def test_dense_training_macs_are_three_products_less_the_first_input_gradient(tmp_path):
    result = training.train(config(tmp_path / "run", method="dense", epochs=1))
    samples = 1294
    assert result["training_macs"] == samples * (2 * 64 * 64 + 3 * 64 * 32 + 3 * 32 * 10)
    assert result["inference_macs_per_sample"] == 64 * 64 + 64 * 32 + 32 * 10


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{"method": "magnitude"}, {"method": "magnitude", "storage": "packed"}, {"method": "static"}]
)
def test_zero_blocks_are_left_out_of_inference_whoever_made_them(tmp_path, settings):
    result = training.train(config(tmp_path / "run", epochs=1, **settings))
    live = [
        layer["out_features"] * layer["in_features"] * layer["live_blocks"] / layer["total_blocks"] for layer in result["layers"]
    ]
    assert result["inference_macs_per_sample"] == pytest.approx(sum(live), abs=1)


class Interrupt(Exception):
    pass


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder and the result of a training that nothing happens to, once for each method."""
    done: dict[str, tuple[Path, dict]] = {}

    def of(method: str) -> tuple[Path, dict]:
        if method not in done:
            out = tmp_path_factory.mktemp(method) / "whole"
            done[method] = out, training.train(config(out, method=method))
        return done[method]

    return of


# of 4 epochs: two-phase lifts in the second and heals from the third
@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "after"), [("two-phase", 1), ("two-phase", 2), ("two-phase", 3), ("kron-l1", 2), ("magnitude", 2)]
)
def test_interrupted_and_resumed_equals_uninterrupted(whole, tmp_path, monkeypatch, method, after):
    out, expected = whole(method)

    class Dies(training.Classification):
        def on_train_batch_start(self, batch, batch_idx):
            if self.current_epoch == after and batch_idx == 5:
                raise Interrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "Classification", Dies)
        with pytest.raises(Interrupt):
            training.train(config(tmp_path / "parts", method=method))
    assert not (tmp_path / "parts" / "result.json").exists()
    torch.manual_seed(12345)
    resumed = training.train(config(tmp_path / "parts", method=method, resume=True))
    assert lasting(resumed) == lasting(expected)
    saved = [{path.name: path.read_bytes() for path in (run / "model").iterdir()} for run in (tmp_path / "parts", out)]
    assert saved[0] == saved[1] and len(saved[0]) == 3
    assert (tmp_path / "parts/masks.safetensors").read_bytes() == (out / "masks.safetensors").read_bytes()


@pytest.mark.slow
def test_a_finished_training_is_not_run_again(tmp_path):
    first = training.train(config(tmp_path / "run", epochs=1))
    before = (tmp_path / "run" / "result.json").stat().st_mtime_ns
    assert training.train(config(tmp_path / "run", epochs=1, resume=True)) == json.loads(json.dumps(first))
    assert (tmp_path / "run" / "result.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_folder_of_an_earlier_version_goes_on(tmp_path):
    """Written before some settings existed, and with a result that said less."""
    first = training.train(config(tmp_path / "run", epochs=1))
    known, result = tmp_path / "run/config.json", tmp_path / "run/result.json"
    settings = json.loads(known.read_text())
    del settings["goal"], settings["recipe"]["lifted_weight_decay"]
    known.write_text(json.dumps(settings))
    result.write_text(json.dumps({**json.loads(result.read_text()), "version": 1, "test_accuracy": -1}))
    again = training.train(config(tmp_path / "run", epochs=1, resume=True))
    assert again["version"] == training.RESULT_VERSION and lasting(again) == lasting(first)
    with pytest.raises(KronblocksError, match="other settings.*recipe"):
        training.train(config(tmp_path / "run", epochs=1, resume=True, lifted_weight_decay=0.1))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"method": "kron-l1", "lifted_lr_scale": 2.0}, "'kron-l1' has no parameters for --lifted-lr-scale"),
        ({"method": "dense", "factor_weight_decay": 0.1}, "'dense' has no parameters for --factor-weight-decay"),
        ({"method": "magnitude", "lifted_weight_decay": 0.1}, "add --storage packed"),
        ({"method": "group-lasso", "factor_lr_scale": 2.0}, "leave it out"),
        ({"block_size": "auto", "candidates": ()}, "--candidates names no block size"),
        ({"block_size": "auto", "candidates": ("4", "four")}, "cannot read 'four' as a block size"),
    ],
)
def test_settings_that_would_do_nothing_are_refused_before_the_folder_is_taken(tmp_path, settings, says):
    with pytest.raises(KronblocksError, match=says):
        config(tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_comparisons_give_free_values_settings_to_methods_that_have_some(tmp_path):
    compared = CompareConfig(
        out=tmp_path, data="digits", methods=("dense", "two-phase", "kron-l1", "magnitude", "rigl"), lifted_lr_scale=2.0
    )
    assert [run.lifted_lr_scale for run in compared.runs()] == [None, 2.0, None, None, 2.0]
    packed = dataclasses.replace(compared, methods=("magnitude",), storage="packed")
    assert [run.lifted_lr_scale for run in packed.runs()] == [2.0]


@pytest.mark.slow
def test_folders_in_use_are_refused(tmp_path):
    out = tmp_path / "run"
    training.train(config(out, epochs=1))
    with pytest.raises(KronblocksError, match="not empty.*--resume"):
        training.train(config(out, epochs=1))
    with pytest.raises(KronblocksError, match="other settings.*epochs"):
        training.train(config(out, epochs=2, resume=True))
    with training.RunFolder.open(config(tmp_path / "busy")), pytest.raises(KronblocksError, match="another process"):
        training.train(config(tmp_path / "busy", resume=True))
    (tmp_path / "file").write_text("")
    with pytest.raises(KronblocksError, match="cannot write"):
        training.train(config(tmp_path / "file" / "run"))


@pytest.mark.slow
def test_damaged_checkpoints_are_refused_and_left_alone(tmp_path):
    out = tmp_path / "run"
    training.train(config(out, epochs=1))
    (out / "result.json").unlink()
    checkpoint = next((out / "checkpoints").iterdir())
    whole = checkpoint.read_bytes()
    for damage in ("truncated", "foreign", "pickle"):
        if damage == "truncated":
            checkpoint.write_bytes(whole[:1000])
        elif damage == "foreign":
            torch.save({"state_dict": {}}, checkpoint)
        else:
            torch.save(Path("/tmp"), checkpoint)  # an object that only unpickling would make
        before = checkpoint.read_bytes()
        with pytest.raises(KronblocksError, match=r"cannot be read|is not a checkpoint"):
            training.train(config(out, epochs=1, resume=True))
        assert checkpoint.read_bytes() == before and not (out / "result.json").exists(), damage


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"block_size": "7y"}, "block size"),
        ({"rank": 0}, "rank"),
        ({"sparsity": 1.0}, "0.9 means 90%"),
        ({"epochs": 0}, "--epochs"),
        ({"seed": -1}, "--seed"),
        ({"tile_groups": "x"}, "tile_groups is"),
        ({"threads": 0}, "--threads"),
        ({"model": "lenet5", "widths": (64, 32)}, "--widths.*lenet5 has none"),
        ({"method": "magnitude", "rank": 2}, "has no rank"),
        ({"method": "dense", "block_size": "auto"}, "no blocks to search for"),
        ({"block_size": "16", "goal": "accuracy"}, "for --block-size auto, not 16"),
        ({"candidates": ("4", "8")}, "for --block-size auto"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(tmp_path, settings, says):
    with pytest.raises(KronblocksError, match=says):
        config(tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_settings_that_do_not_fit_the_model_leave_no_folder(tmp_path):
    with pytest.raises(KronblocksError, match="lenet5 needs"):
        training.train(config(tmp_path / "run", model="lenet5"))
    with pytest.raises(KronblocksError, match="without a live block"):
        training.train(config(tmp_path / "run", model="linear", block_size="10x64"))
    with pytest.raises(KronblocksError, match="none of the block sizes fits"):
        training.train(config(tmp_path / "run", block_size="auto", candidates=("7", "9")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("settings", [{}, {"block_size": "auto"}, {"method": "dense"}])
def test_too_few_steps_leave_no_folder(tmp_path, settings):
    with pytest.raises(KronblocksError, match=r"^1 step is too few to prune from 0.05 to 0.\d of the training: train longer"):
        training.train(config(tmp_path / "run", epochs=1, batch_size=5000, **settings))
    assert not (tmp_path / "run").exists()


def test_compare_gives_settings_to_the_methods_that_have_them(tmp_path):
    settings = {"rank": 2, "schedule": ScheduleConfig(end=0.7, lift_at=0.5), "penalty": PenaltyConfig(strength=2.0, growth=5.0)}
    runs = CompareConfig(out=tmp_path, methods=("dense", "two-phase", "kron-l1", "group-lasso"), **settings).runs()
    found = [(run.rank, run.schedule.end, run.schedule.lift_at, run.penalty.strength, run.penalty.growth) for run in runs]
    assert found == [
        (None, 0.7, 2 / 3, None, 3.0),
        (2, 0.7, 0.5, None, 3.0),
        (2, 0.7, 2 / 3, 2.0, 5.0),
        (None, 0.7, 2 / 3, 2.0, 3.0),
    ]
    with pytest.raises(KronblocksError, match="none of --methods dense magnitude .*rank"):
        CompareConfig(out=tmp_path, methods=("dense", "magnitude"), rank=2)


def test_a_method_of_a_module_that_the_user_names(tmp_path, monkeypatch, capsys):
    module, line = f"own_method_{tmp_path.name}".replace("-", "_"), "--data digits --widths 16 --epochs 1 --block-size 4"
    (tmp_path / f"{module}.py").write_text(
        "from kronblocks.algorithms.rules.magnitude import Magnitude\n"
        "from kronblocks.config import MethodSpec, register_method\n"
        f"register_method({module!r}, MethodSpec(lambda choices: Magnitude('taylor')))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "train_apart", training.train)
    with pytest.raises(SystemExit):
        main(["train", *line.split(), "--method", module, "--out", "x"])
    assert f"method='{module}' is unknown" in capsys.readouterr().err
    try:
        methods = ["--plugins", module, "--methods", module]
        main(["compare", *line.split(), "--batch-size", "64", *methods, "--schedule.update-every", "2", "--out", "runs"])
        assert json.loads((tmp_path / f"runs/{module}-4x4-s0/result.json").read_text())["block_sparsity"] >= 0.9
    finally:
        METHODS.pop(module, None)


def test_a_module_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(KronblocksError, match="cannot import 'no.such.module' of --plugins"):
        config(tmp_path / "run", plugins=("no.such.module",))


def test_compare_runs_every_method_and_seed_once(tmp_path):
    runs = CompareConfig(out=tmp_path, methods=("dense", "kron-l1", "dense"), seeds=(1, 2), block_size="8").runs()
    assert [run.out.name for run in runs] == ["dense-s1", "kron-l1-8x8-s1", "dense-s2", "kron-l1-8x8-s2"]
    assert [(run.method, run.seed) for run in runs] == [("dense", 1), ("kron-l1", 1), ("dense", 2), ("kron-l1", 2)]


@pytest.mark.slow
def test_auto_searches_once_and_trains_what_was_found(tmp_path, monkeypatch):
    settings = {"block_size": "auto", "epochs": 16, "batch_size": 32, "candidates": ("4", "8", "16")}
    result = training.train(config(tmp_path / "run", **settings))
    assert result["search"]["winner"] in {path["block"] for path in result["search"]["paths"]}
    sizes = {layer["name"]: layer["block_size"] for layer in result["layers"]}
    assert sizes == result["search"]["chosen"] and result["block_sparsity"] >= 0.9
    (tmp_path / "run" / "result.json").unlink()
    monkeypatch.setattr(training, "search_for", lambda *args: pytest.fail("searched again"))
    again = training.train(config(tmp_path / "run", resume=True, **settings))
    assert again["search"] == result["search"] and again["test_accuracy"] == result["test_accuracy"]
    page = write_report(find_runs([tmp_path / "run"]), tmp_path / "report").read_text()
    for path in result["search"]["paths"]:  # the report says what became of each
        assert html.escape(path["why"], quote=False) in page
        if path["gap"] is not None:
            assert page.count(f"<td>{100 * path['gap']:+.1f} ± {100 * path['gap_error']:.1f}%</td>") >= 1
    assert "## The search for the block size" in (tmp_path / "report/report.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("criterion", ["halving", "removal", "penalty --weights equal --strength 20"])
def test_search_on_the_command_line(tmp_path, capsys, criterion):
    line = f"search --data digits --widths 32 --epochs 4 --batch-size 32 --sizes 2 4 --threads 1 --criterion {criterion}"
    main([*line.split(), "--out", str(tmp_path / "found")])
    report = json.loads((tmp_path / "found" / "search.json").read_text())
    assert (tmp_path / "found" / "search.png").read_bytes().startswith(b"\x89PNG")
    assert report["criterion"] == criterion.split()[0] and report["winner"] in ("2x2", "4x4")
    assert all(path["history"] and path["why"] for path in report["paths"])  # the norm of each over the steps
    assert f"found: {report['winner']}" in capsys.readouterr().out


@pytest.mark.parametrize("sizes", ["--sizes", "--sizes 4"])
def test_a_search_wants_two_sizes(capsys, sizes):
    with pytest.raises(SystemExit):
        main(f"search --data digits {sizes}".split())
    assert "a search needs at least two, such as 4 8 16x4" in capsys.readouterr().err


def test_the_strength_of_a_penalty_is_refused_where_there_is_none(capsys):
    with pytest.raises(SystemExit):
        main(["search", "--data", "digits", "--strength", "5", "--criterion", "removal"])
    assert "--criterion penalty" in capsys.readouterr().err


def test_compare_gives_new_settings_to_the_methods_that_have_them(tmp_path):
    methods = ("dense", "rigl", "iterative", "elastic-group-lasso", "two-phase")
    settings = {"distribution": "uniform", "regrow": 0.2, "scope": "layer", "penalty": PenaltyConfig(ridge=3.0)}
    runs = {run.method: run for run in CompareConfig(out=tmp_path, methods=methods, **settings).runs()}
    found = {name: (run.distribution, run.regrow, run.scope, run.penalty.ridge) for name, run in runs.items()}
    assert found == {
        "dense": (None, None, "global", 1.0),
        "rigl": ("uniform", 0.2, "global", 1.0),
        "iterative": (None, 0.2, "layer", 1.0),
        "elastic-group-lasso": (None, None, "layer", 3.0),
        "two-phase": (None, 0.2, "layer", 1.0),
    }
    runs = CompareConfig(out=tmp_path, methods=("dense", "two-phase"), block_size="auto").runs()
    assert [(run.block_size, run.out.name) for run in runs] == [(16, "dense-s0"), ("auto", "two-phase-auto-s0")]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit-tiny", "swin-tiny"])
def test_a_short_training_of_the_papers_transformers(tmp_path, name):
    few = {"image_size": 32, "train_images": 32, "test_images": 20, "epochs": 2, "batch_size": 8, "measure_plans": False}
    schedule = ScheduleConfig(update_every=2)
    result = training.train(config(tmp_path / "run", model=name, block_size="16", sparsity=0.8, schedule=schedule, **few))
    dense = sum(parameter.numel() for parameter in build_model(name, (1, 8, 8), 10, (), 32).parameters())
    assert 0.8 <= result["block_sparsity"] < 0.81 and result["trainable_parameters_max"] < 0.5 * dense
    model = from_pretrained(tmp_path / "run" / "model", build_model(name, (1, 8, 8), 10, (), 32))
    kinds = [type(module).__name__ for module in model.modules()]
    assert kinds.count("BlockSparseLinear") == len(result["layers"]) and "KroneckerBlockLinear" not in kinds
    zeros = sum((module.weight == 0).sum().item() for module in model.modules() if type(module).__name__ == "BlockSparseLinear")
    weights = sum(module.weight.numel() for module in model.modules() if type(module).__name__ == "BlockSparseLinear")
    assert zeros / weights == pytest.approx(result["block_sparsity"], abs=0.001)
