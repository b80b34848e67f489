"""Accelerate, on one process or several: accelerate launch examples/accelerate_loop.py FOLDER (or plain python)"""

import sys

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kronblocks

EPOCHS = 14


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def main(folder: str) -> None:
    torch.manual_seed(0)
    images, labels = (torch.tensor(values) for values in load_digits(return_X_y=True))
    images = images.float() / 16
    data = DataLoader(TensorDataset(images[:1400], labels[:1400]), batch_size=64, shuffle=True)

    model = make()
    sparsifier = kronblocks.sparsify_(model, kronblocks.SparsityConfig(block_size=8, target_sparsity=0.9, exclude=("4",)))
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(kronblocks.parameter_groups(model, lr=4e-3))
    wrapped, optimizer, data = accelerator.prepare(model, optimizer, data)
    sparsifier.attach(optimizer, total_steps=EPOCHS * len(data))

    for _ in range(EPOCHS):
        for inputs, targets in data:
            optimizer.zero_grad()
            accelerator.backward(nn.functional.cross_entropy(wrapped(inputs), targets) + sparsifier.penalty())
            optimizer.step()

    model.eval()
    accuracy = (model(images[1400:]).argmax(1) == labels[1400:]).float().mean().item()
    accelerator.print(f"{100 * sparsifier.sparsity:.1f}% of the weights in zero blocks, test accuracy {accuracy:.3f}")
    if accelerator.is_main_process:
        kronblocks.save_pretrained(model, folder)
    accelerator.wait_for_everyone()  # a process that leaves early can take the one that saves with it
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/saved")
