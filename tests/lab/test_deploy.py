"""`kronblocks export` and `kronblocks inspect` on a real training."""

from __future__ import annotations

import json

import pytest
import torch

from kronblocks import BlockSparseLinear, KronblocksError
from kronblocks_lab.__main__ import main
from kronblocks_lab.commands import export
from kronblocks_lab.training.settings import TrainConfig
from kronblocks_lab.training.train import train
from kronblocks_lab.training.trained import trained_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deploy") / "run"
    train(TrainConfig(out=folder, data="digits", widths=(32,), epochs=3, batch_size=64, block_size="4", progress=False))
    return folder


@pytest.mark.needs("onnx")
def test_a_training_is_exported_and_inspected(run, tmp_path, capsys):
    files = ["--out", str(tmp_path / "out"), "--onnx", str(tmp_path / "x.onnx")]
    main(["export", str(run), "--form", "packed", "--rows", "9", *files])
    said = capsys.readouterr().out
    assert "asked for" in said and "exported: " in said and "onnx: " in said and (tmp_path / "x.onnx").exists()
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert [layer["form"] for layer in manifest["layers"]] == ["packed", "packed"] and manifest["layers"][0]["rows"] == 9
    main(["inspect", str(tmp_path / "out")])
    assert "BlockSparseLinear" in (said := capsys.readouterr().out) and "values" in said and "together" in said
    main(["inspect", str(run)])
    assert "test accuracy: " in capsys.readouterr().out
    (weights,) = (tmp_path / "out").glob("*.safetensors")
    main(["inspect", str(weights)])
    assert "block_mask" in capsys.readouterr().out


def test_the_trained_model_comes_back(run):
    model, shape, _ = trained_model(run)
    assert shape == (1, 8, 8) and sum(isinstance(each, BlockSparseLinear) for each in model.modules()) == 2
    exported = export.main(export.ExportConfig(run=run, out=run.parent / "again", form="dense", rows=5))
    x = torch.randn(5, *shape)
    torch.testing.assert_close(exported.model(x), model(x))


def test_int8_beside_the_accuracy_on_validation_images(run, tmp_path, capsys):
    main(["export", str(run), "--form", "packed-int8", "--evaluate", "--out", str(tmp_path / "out")])
    result = json.loads((run / "result.json").read_text())
    scores = json.loads((tmp_path / "out/manifest.json").read_text())["scores"]
    assert scores["model"] == pytest.approx(result["validation_accuracy"], abs=1e-6)
    assert abs(scores["exported"] - scores["model"]) < 0.05
    said = capsys.readouterr().out
    assert "packed-int8" in said and f"evaluated: {scores['model']:.6g} for the model" in said
    main(["inspect", str(tmp_path / "out")])
    assert "QuantizedBlockLinear" in capsys.readouterr().out


def test_folders_that_hold_nothing_of_the_kind(run, tmp_path, capsys):
    with pytest.raises(KronblocksError, match="holds no trained model"):
        trained_model(tmp_path)
    for line, says in (
        (["inspect", str(tmp_path)], "holds no kronblocks.json"),
        (["inspect", str(run / "config.json")], "cannot read"),
        (["export", str(run), "--out", str(tmp_path / "x"), "--rows", "0"], "--rows must be at least 1"),
    ):
        with pytest.raises(SystemExit):
            main(line)
        assert says in capsys.readouterr().err
