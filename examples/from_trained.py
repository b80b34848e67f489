"""A trained transformer made 80% block-sparse, its own outputs as teacher. python examples/from_trained.py FOLDER"""

import math
import sys
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

import kronblocks

EPOCHS = 8


def make(image_size: int = 8, patch_size: int = 2, hidden_size: int = 64, layers: int = 2) -> ViTForImageClassification:
    sizes: dict[str, Any] = {"hidden_size": hidden_size, "num_hidden_layers": layers, "intermediate_size": 4 * hidden_size}
    config = ViTConfig(image_size=image_size, patch_size=patch_size, num_channels=1, num_attention_heads=4, **sizes)
    config.num_labels = 10
    return ViTForImageClassification(config)


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int = EPOCHS,
    sparsifier: kronblocks.Sparsifier | None = None,
    distillation: kronblocks.Distillation | None = None,
) -> None:
    steps = epochs * math.ceil(len(images) / 64)
    optimizer = torch.optim.AdamW(kronblocks.parameter_groups(model, lr=1e-3, weight_decay=0.05))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [g["lr"] for g in optimizer.param_groups], steps, pct_start=0.1)
    if sparsifier is not None:
        sparsifier.attach(optimizer, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(64):
            logits = model(pixel_values=images[chosen]).logits
            loss = nn.functional.cross_entropy(logits, labels[chosen])
            if distillation is not None:
                loss = distillation(loss, logits, pixel_values=images[chosen])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    return (model(pixel_values=images).logits.argmax(1) == labels).float().mean().item()


def main(folder: str) -> None:
    torch.manual_seed(0)
    images, labels = (torch.tensor(values) for values in load_digits(return_X_y=True))
    images = images.float().view(-1, 1, 8, 8) / 8 - 1
    model = make()
    train(model, images[:1400], labels[:1400])
    print(f"dense: test accuracy {accuracy(model, images[1400:], labels[1400:]):.3f}")

    distillation = kronblocks.Distillation.of(model)  # before sparsify_
    config = kronblocks.SparsityConfig(method="rigl", init="nearest", block_size=8, target_sparsity=0.8, exclude=("classifier",))
    sparsifier = kronblocks.sparsify_(model, config)
    print(sparsifier.surgery)  # with the error of each layer's start
    train(model, images[:1400], labels[:1400], epochs=12, sparsifier=sparsifier, distillation=distillation)
    found = accuracy(model, images[1400:], labels[1400:])
    print(f"{100 * sparsifier.sparsity:.1f}% of the weights in zero blocks, test accuracy {found:.3f}")
    kronblocks.save_pretrained(model, folder)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/saved")
