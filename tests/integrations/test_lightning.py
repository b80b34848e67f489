"""The callback sparsifies, follows, adds the penalty, logs what is counted, and resumes to the same bits."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kronblocks import BlockSparseLinear, KronblocksError, PenaltyConfig, SparsityConfig, parameter_groups
from kronblocks.integrations.lightning import SparsityCallback
from kronblocks.sparsity.report import count_blocks


class Module(pl.LightningModule):
    def __init__(self, groups: bool = True, output: type = torch.Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8))
        self.groups, self.output = groups, output
        self.losses: list[float] = []

    def training_step(self, batch, batch_idx):
        (x,) = batch
        loss = (self.net(x) - x[:, :8].sin()).square().mean()
        self.losses.append(float(loss))
        return {"loss": loss} if self.output is dict else loss

    def test_step(self, batch, batch_idx):
        self.log("test", self.net(batch[0]).square().mean())

    def configure_optimizers(self):
        rate = 1e-2
        return torch.optim.AdamW(parameter_groups(self, lr=rate) if self.groups else self.parameters(), lr=rate)


def config(**settings) -> SparsityConfig:
    return SparsityConfig(**{"block_size": 4, "rank": 2, "target_sparsity": 0.75, "measure_plans": False, **settings})


def data() -> DataLoader:
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x), batch_size=8)


def trainer(folder, callback, **settings) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "logger": False}
    return pl.Trainer(default_root_dir=folder, callbacks=[callback], **{"max_epochs": 8, **quiet, **settings})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("groups", [True, False])
def test_it_trains_to_the_target_and_logs_what_is_counted(tmp_path, groups):
    callback, module = SparsityCallback(config()), Module(groups)
    fit = trainer(tmp_path, callback)
    fit.fit(module, data())
    assert isinstance(module.net[0], BlockSparseLinear) and callback.sparsifier.step == 64
    counted = count_blocks(callback.sparsifier.targets).block_sparsity
    assert counted == pytest.approx(0.75) and fit.callback_metrics["block_sparsity"] == pytest.approx(counted)
    assert fit.callback_metrics["phase"] == 2
    assert module.losses[-1] < module.losses[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("groups", [True, False])
@pytest.mark.parametrize("stop", [2, 5])  # before the lift and after it
def test_a_resumed_training_ends_with_the_same_bits(tmp_path, groups, stop):
    whole = Module(groups)
    trainer(tmp_path / "whole", SparsityCallback(config())).fit(whole, data())
    first = trainer(tmp_path / "parts", SparsityCallback(config(), total_steps=64), max_epochs=stop)
    first.fit(Module(groups), data())
    first.save_checkpoint(tmp_path / "stopped.ckpt")
    resumed = Module(groups)
    fit = trainer(tmp_path / "parts", SparsityCallback(config()))
    fit.fit(resumed, data(), ckpt_path=tmp_path / "stopped.ckpt", weights_only=True)
    expected, found = whole.state_dict(), resumed.state_dict()
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    fit.save_checkpoint(tmp_path / "end.ckpt")
    tested = trainer(tmp_path / "test", SparsityCallback(config()))
    fresh = Module(groups)
    tested.test(fresh, data(), ckpt_path=tmp_path / "end.ckpt", verbose=False, weights_only=True)
    assert torch.equal(fresh.net[0].weight, whole.net[0].weight)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("output", [torch.Tensor, dict])
def test_the_penalty_is_in_the_loss(tmp_path, output):
    method = config(method="group-lasso", rank=None, penalty=PenaltyConfig(form="gradient", strength=0.1))
    norms = []
    for strength in (method, config(method="group-lasso", rank=None, penalty=PenaltyConfig(form="gradient", strength=0.0))):
        module = Module(output=output)
        trainer(tmp_path, SparsityCallback(strength), max_epochs=2).fit(module, data())
        norms.append(float(module.net[0].weight.norm()))
    assert norms[0] < norms[1]


@pytest.mark.filterwarnings("ignore")
def test_gradient_accumulation_counts_optimiser_steps(tmp_path):
    callback = SparsityCallback(config())
    trainer(tmp_path, callback, accumulate_grad_batches=4).fit(Module(), data())
    assert callback.sparsifier.step == 16 and callback.sparsifier.sparsity == pytest.approx(0.75)


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_is_said(tmp_path):
    with pytest.raises(KronblocksError, match="has no end"):
        trainer(tmp_path, SparsityCallback(config()), max_epochs=-1).fit(Module(), data())
    plain = trainer(tmp_path, pl.Callback(), max_epochs=1)
    plain.fit(Module(), data())
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(KronblocksError, match="without SparsityCallback"):
        trainer(tmp_path, SparsityCallback(config())).fit(Module(), data(), ckpt_path=tmp_path / "plain.ckpt", weights_only=True)


@pytest.mark.filterwarnings("ignore")
def test_a_penalty_and_manual_optimisation_do_not_go_together(tmp_path):
    module = Module()
    module.automatic_optimization = False
    with pytest.raises(KronblocksError, match="manual optimisation"):
        trainer(tmp_path, SparsityCallback(config(method="group-lasso", rank=None, penalty=PenaltyConfig(form="gradient")))).fit(
            module, data()
        )
