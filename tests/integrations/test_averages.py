"""Lightning's averages of weights begin again where layers are replaced, go on from checkpoints, and end with the same zeros."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from tests.integrations.small_lightning import Module, config, data, trainer
from torch import nn

from kronblocks import KronblocksError
from kronblocks.algorithms.training.report import count_blocks
from kronblocks.integrations.lightning import SparsityCallback


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["two-phase", "magnitude", "rigl"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (EMAWeightAveraging, {"decay": 0.8}),
        (EMAWeightAveraging, {"decay": 0.8, "use_buffers": False}),
        (WeightAveraging, {"use_buffers": False}),
        (StochasticWeightAveraging, {"swa_lrs": 1e-2, "swa_epoch_start": 2, "annealing_epochs": 1}),
    ],
)
def test_averages_of_weights_begin_again_with_the_layers_and_keep_the_zeros(tmp_path, method, kind, settings):
    callback, module = SparsityCallback(config(method=method, rank=2 if method == "two-phase" else None)), Module()
    fit = trainer(tmp_path, [callback, kind(**settings)])
    last: dict[str, torch.Tensor] = {}
    fit.callbacks.append(Remember(last))
    fit.fit(module, data())
    counted = count_blocks(callback.sparsifier.targets)
    assert counted.block_sparsity == pytest.approx(0.75)
    assert any(not torch.equal(last[name], each) for name, each in module.state_dict().items()), "it is an average"
    for (x,) in data():
        layers = [nn.functional.linear(x, module.net[0].weight, module.net[0].bias).tanh()]
        expected = nn.functional.linear(layers[0], module.net[2].weight, module.net[2].bias)
        torch.testing.assert_close(module.net(x), expected)
    assert float(sum((module.net(x) - x[:, :8].sin()).square().mean() for (x,) in data())) / 8 < module.losses[0]


class Remember(pl.Callback):
    """The weights of the last step, before an average takes their place."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        self.state = state

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.state.clear()
        self.state.update({name: each.clone() for name, each in pl_module.state_dict().items()})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stop", [2, 5])  # before the lift and in healing
def test_an_average_goes_on_from_a_checkpoint(tmp_path, stop):
    def fit(epochs, ckpt=None):
        module = Module()
        run = trainer(tmp_path, [SparsityCallback(config(), total_steps=64), EMAWeightAveraging(decay=0.8)], max_epochs=epochs)
        run.fit(module, data(), ckpt_path=ckpt, weights_only=True if ckpt else None)
        return run, module

    saver = pl.callbacks.ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    whole = Module()
    run = trainer(tmp_path, [SparsityCallback(config()), EMAWeightAveraging(decay=0.8), saver])
    run.fit(whole, data())
    resumed = fit(8, tmp_path / f"epoch={stop - 1}.ckpt")[1]
    expected, found = whole.state_dict(), resumed.state_dict()
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.filterwarnings("ignore")
def test_an_average_that_is_listed_first_is_refused(tmp_path):
    with pytest.raises(KronblocksError, match=r"callbacks=\[SparsityCallback\(\.\.\.\), EMAWeightAveraging\(\.\.\.\)\]"):
        trainer(tmp_path, [EMAWeightAveraging(), SparsityCallback(config())]).fit(Module(), data())


@pytest.mark.filterwarnings("ignore")
def test_an_average_that_cannot_be_of_masks_is_refused_before_the_first_step(tmp_path):
    module = Module()
    with pytest.raises(KronblocksError, match=r"cannot average the masks .*: write WeightAveraging\(use_buffers=False\)"):
        trainer(tmp_path, [SparsityCallback(config()), WeightAveraging()]).fit(module, data())
    assert not module.losses
    trainer(tmp_path, [SparsityCallback(config(method="magnitude", rank=None)), WeightAveraging()]).fit(Module(), data())
