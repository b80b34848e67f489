"""DistributedDataParallel: torchrun --nproc-per-node 2 examples/torchrun_ddp.py FOLDER"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import kronblocks

STEPS, BATCH = 300, 64


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def train(folder: str) -> None:
    rank, world = distributed.get_rank(), distributed.get_world_size()
    images, labels = (torch.tensor(values) for values in load_digits(return_X_y=True))
    images = images.float() / 16

    torch.manual_seed(0)
    model = make()
    sparsifier = kronblocks.sparsify_(model, kronblocks.SparsityConfig(block_size=8, target_sparsity=0.9, exclude=("4",)))
    wrapped = DistributedDataParallel(model)  # follows the lift by itself
    optimizer = torch.optim.AdamW(kronblocks.parameter_groups(model, lr=4e-3))
    sparsifier.attach(optimizer, total_steps=STEPS)

    for _ in range(STEPS):
        chosen = torch.randint(1400, (BATCH,)).chunk(world)[rank]  # the same draw on every rank, a share for each
        loss = nn.functional.cross_entropy(wrapped(images[chosen]), labels[chosen]) + sparsifier.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    if rank == 0:
        model.eval()
        accuracy = (model(images[1400:]).argmax(1) == labels[1400:]).float().mean().item()
        print(f"{100 * sparsifier.sparsity:.1f}% of the weights in zero blocks, test accuracy {accuracy:.3f}")
        kronblocks.save_pretrained(model, folder)


if __name__ == "__main__":
    distributed.init_process_group("gloo")
    train(sys.argv[1] if len(sys.argv) > 1 else "runs/saved")  # what is wrapped is gone before the group is
    distributed.barrier()
    distributed.destroy_process_group()
