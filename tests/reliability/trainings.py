"""`kronblocks train` in processes of its own, which begin at once: they are forked from one that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
from multiprocessing.connection import Connection
from pathlib import Path

from kronblocks_lab.__main__ import main

SETTINGS = "--data digits --epochs 10 --widths 64 32 --block-size 8 --rank 2 --batch-size 64 --progress False --threads 1"

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["kronblocks_lab.commands.train", "lightning.pytorch", "sklearn.datasets"])


def arguments(out: Path) -> list[str]:
    """Of the command line."""
    return ["train", "--out", str(out), *SETTINGS.split()]


def limit_files(size: int) -> None:
    """Files of this process cannot grow beyond so many bytes, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _train(out: Path, words: Connection, room: int | None) -> None:
    for stream in (1, 2):
        os.dup2(words.fileno(), stream)
    if room is not None:
        limit_files(room)
    main([*arguments(out), "--resume"])


class Training:
    """One that runs, and resumes what is there.

    Args:
        out: its folder.
        room: bytes that a file may have.
    """

    def __init__(self, out: Path, room: int | None = None) -> None:
        self._reader, writer = _CONTEXT.Pipe(duplex=False)
        self._process = _CONTEXT.Process(target=_train, args=(out, writer, room))
        self._process.start()
        writer.close()

    def ends_within(self, seconds: float | None) -> bool:
        """Wait so long, or until it ends."""
        self._process.join(seconds)
        return self._process.exitcode is not None

    def kill(self) -> None:
        """By SIGKILL."""
        self._process.kill()
        self._process.join()

    def end(self) -> tuple[int, str]:
        """Wait for it: the exit status, and what it said."""
        said = b"".join(iter(lambda: os.read(self._reader.fileno(), 2**16), b""))
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode, said.decode()
