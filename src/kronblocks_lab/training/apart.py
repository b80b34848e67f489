"""Run a training in its own process."""

from __future__ import annotations

import multiprocessing
import sys

from kronblocks.core.errors import KronblocksError
from kronblocks_lab.training.settings import TrainConfig


def train_apart(config: TrainConfig) -> None:
    """Train in a separate process, so that memory and threads of one training do not affect the next.

    Raises:
        KronblocksError: the training failed; it has said why on stderr.
        KeyboardInterrupt: it was interrupted.
    """
    process = multiprocessing.get_context("spawn").Process(target=_train, args=(config,), name=config.out.name)
    process.start()
    try:
        process.join()
    except KeyboardInterrupt:
        process.join()
        raise
    if process.exitcode == 130:
        raise KeyboardInterrupt
    if process.exitcode:
        raise KronblocksError(f"the training in {config.out} failed (see above); what it finished is kept, to go on from")


def _train(config: TrainConfig) -> None:
    """What the new process does; its exit code tells how it went."""
    from kronblocks_lab.training.train import train

    try:
        train(config)
    except KronblocksError as error:
        sys.stderr.write(f"kronblocks: {error}\n")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
