"""Plain PyTorch, three lines of change: python examples/plain_loop.py [FOLDER to save into]"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn

import kronblocks

STEPS = 300


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def main(folder: str) -> None:
    torch.manual_seed(0)
    images, labels = (torch.tensor(values) for values in load_digits(return_X_y=True))
    images = images.float() / 16

    model = make()
    sparsifier = kronblocks.sparsify_(model, kronblocks.SparsityConfig(block_size=8, target_sparsity=0.9, exclude=("4",)))  # 1
    optimizer = torch.optim.AdamW(kronblocks.parameter_groups(model, lr=4e-3))
    sparsifier.attach(optimizer, total_steps=STEPS)  # 2

    for _ in range(STEPS):
        chosen = torch.randint(1400, (64,))
        loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen]) + sparsifier.penalty()  # 3
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    model.eval()
    accuracy = (model(images[1400:]).argmax(1) == labels[1400:]).float().mean().item()
    print(f"{100 * sparsifier.sparsity:.1f}% of the weights in zero blocks, test accuracy {accuracy:.3f}")
    kronblocks.save_pretrained(model, folder)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/saved")
