"""Lightning: one callback. python examples/lightning_module.py FOLDER"""

import sys

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kronblocks
from kronblocks.integrations.lightning import SparsityCallback


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


class Digits(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = make()

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def configure_optimizers(self):
        return torch.optim.AdamW(kronblocks.parameter_groups(self, lr=4e-3))


def main(folder: str) -> None:
    pl.seed_everything(0)
    images, labels = (torch.tensor(values) for values in load_digits(return_X_y=True))
    images = images.float() / 16
    callback = SparsityCallback(kronblocks.SparsityConfig(block_size=8, target_sparsity=0.9, exclude=("net.4",)))
    settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_epochs=14, callbacks=[callback], enable_model_summary=False, **settings)
    module = Digits()
    trainer.fit(module, DataLoader(TensorDataset(images[:1400], labels[:1400]), batch_size=64, shuffle=True))

    model = module.net.eval()
    accuracy = (model(images[1400:]).argmax(1) == labels[1400:]).float().mean().item()
    print(f"{100 * trainer.callback_metrics['block_sparsity']:.1f}% of the weights in zero blocks, test accuracy {accuracy:.3f}")
    kronblocks.save_pretrained(model, folder)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/saved")
