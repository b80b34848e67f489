"""Make Lightning's averages of weights follow a model whose layers are replaced or whose blocks are exchanged."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from kronblocks.algorithms.training.sparsifier import Sparsifier
from kronblocks.core.errors import KronblocksError
from kronblocks.nn.block_sparse_linear import BlockSparseLinear

_AVERAGES = (WeightAveraging, StochasticWeightAveraging)


class Averages:
    """Restarts the averaging callbacks of a trainer when layers are replaced or blocks exchanged, and when healing begins.

    So averages end with the model's zeros.
    """

    def __init__(self, sparsifier: Sparsifier) -> None:
        self._sparsifier = sparsifier
        self.note()

    def note(self) -> None:
        """Note the layers and blocks of averages that begin now."""
        self._noted = self._now()

    def _now(self) -> tuple[bool, list[nn.Parameter], list[Tensor]]:
        """Whether the mask is frozen, the parameters, and the positions of blocks."""
        targets = self._sparsifier.targets
        layers = [target.module for target in targets if isinstance(target.module, BlockSparseLinear)]
        parameters = [p for target in targets for p in target.parameters()]
        return self._sparsifier.phase == "heal", parameters, [layer.block_position.clone() for layer in layers]

    def follow(self, trainer: Trainer, module: LightningModule) -> None:
        """After each batch, begin again if something has changed."""
        if not _averages(trainer):
            return
        (was_frozen, before, were), (frozen, now, are) = self._noted, self._now()
        same = len(before) == len(now) and all(p is q for p, q in zip(before, now, strict=True))
        if was_frozen != frozen or not same or not all(torch.equal(p, q) for p, q in zip(were, are, strict=True)):
            self.begin(trainer, module)

    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        """Restart the averages from the present model."""
        for each in _averages(trainer):
            each.setup(trainer, module, "fit")  # copies the model
            if isinstance(each, StochasticWeightAveraging) and each.n_averaged is not None:
                each.n_averaged.zero_()
        self.note()


def check_order(trainer: Trainer, callback: Callback) -> None:
    """Raise KronblocksError for averages listed before the callback, which would copy the model too early."""
    callbacks = _callbacks(trainer)
    if early := [type(each).__name__ for each in callbacks[: callbacks.index(callback)] if isinstance(each, _AVERAGES)]:
        raise KronblocksError(
            f"{early[0]} copies the model before SparsityCallback replaces its layers: write "
            f"callbacks=[SparsityCallback(...), {early[0]}(...)]"
        )


def check_function(trainer: Trainer) -> None:
    """Raise KronblocksError for averages of buffers by a function that does not accept bools, since masks are bools."""
    for each in _averages(trainer):
        if not isinstance(each, WeightAveraging) or not getattr(each, "_use_buffers", False):
            continue
        trial = nn.Module()
        trial.register_buffer("mask", torch.ones(1, dtype=torch.bool))
        average, name = AveragedModel(trial, use_buffers=True, **each._kwargs), type(each).__name__
        try:
            for _ in range(2):
                average.update_parameters(trial)
        except RuntimeError as error:
            raise KronblocksError(
                f"{name} averages buffers too, but its function cannot average the masks of block-sparse layers: write "
                f"{name}(use_buffers=False), which copies buffers"
            ) from error


def _callbacks(trainer: Trainer) -> list[Callback]:
    """All callbacks of a trainer, in order."""
    callbacks: Any = getattr(trainer, "callbacks", [])
    return callbacks


def _averages(trainer: Trainer) -> list[Callback]:
    return [each for each in _callbacks(trainer) if isinstance(each, _AVERAGES)]
