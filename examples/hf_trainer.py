"""transformers' Trainer: one callback, here for a small ViT. python examples/hf_trainer.py FOLDER"""

import sys
import tempfile
from typing import Any

import torch
from sklearn.datasets import load_digits
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

import kronblocks
from kronblocks.integrations.transformers import SparsityCallback


def make() -> ViTForImageClassification:
    sizes: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    config = ViTConfig(image_size=8, patch_size=2, num_channels=1, **sizes)
    config.num_labels = 10
    return ViTForImageClassification(config)


def main(folder: str) -> None:
    set_seed(0)
    images, labels = (torch.tensor(values) for values in load_digits(return_X_y=True))
    images = images.float().view(-1, 1, 8, 8) / 8 - 1
    examples = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]

    config = kronblocks.SparsityConfig(block_size=8, target_sparsity=0.8, exclude=("classifier",))
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=200,
        per_device_train_batch_size=64,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    model = make()
    sparsifier = kronblocks.sparsify_(model, config)  # SparsityCallback(config) would do that, too
    Trainer(model, arguments, train_dataset=examples[:1400], callbacks=[SparsityCallback(sparsifier)]).train()

    model.eval()
    with torch.no_grad():
        accuracy = (model(images[1400:]).logits.argmax(1) == labels[1400:]).float().mean().item()
    print(f"{100 * sparsifier.sparsity:.1f}% of the weights in zero blocks, test accuracy {accuracy:.3f}")
    kronblocks.save_pretrained(model, folder)  # kronblocks.from_pretrained(folder) needs no second argument


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/saved")
