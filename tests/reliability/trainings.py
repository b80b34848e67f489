"""`kronblocks train` on a small network."""

from __future__ import annotations

import resource
import signal
from pathlib import Path

from kronblocks_lab.__main__ import main
from kronblocks_lab.commands import train as _  # noqa: F401  (the processes need not import it)

SETTINGS = "--data digits --epochs 6 --widths 64 32 --block-size 8 --rank 2 --batch-size 64 --progress False --threads 1"


def arguments(out: Path) -> list[str]:
    """Of the command line."""
    return ["train", "--out", str(out), *SETTINGS.split()]


def limit_files(size: int) -> None:
    """Files of this process cannot grow beyond so many bytes, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def train(out: Path, room: int | None = None) -> None:
    """One that resumes what is there; files may have so many bytes."""
    if room is not None:
        limit_files(room)
    main([*arguments(out), "--resume"])
