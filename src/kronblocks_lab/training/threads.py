"""How many threads torch uses, as command lines say it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kronblocks.core.errors import KronblocksError


@dataclass(frozen=True, kw_only=True)
class ThreadSettings:
    """What all commands that compute have in common."""

    threads: int | None = None
    """Threads that torch uses; unset: its own choice."""

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise KronblocksError(f"--threads must be at least 1, not {self.threads}")

    def use_threads(self) -> None:
        """Let torch use them."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
