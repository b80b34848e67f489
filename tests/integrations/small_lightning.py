"""A small LightningModule, its data and its trainer."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from tests import helpers
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kronblocks import SparsityConfig, parameter_groups


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

    def configure_optimizers(self) -> Any:
        rate = 1e-2
        return torch.optim.AdamW(parameter_groups(self, lr=rate) if self.groups else self.parameters(), lr=rate)


def config(**settings: Any) -> SparsityConfig:
    return helpers.config(**{"block_size": 4, "rank": 2, **settings})


def data() -> DataLoader:
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x), batch_size=8)


def trainer(folder, callback, **settings) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "logger": False}
    return pl.Trainer(default_root_dir=folder, callbacks=callback, **{"max_epochs": 8, **quiet, **settings})
