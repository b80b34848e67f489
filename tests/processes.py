"""Processes that begin at once and know nothing of the tests before them.

Each is forked from one that pytest forks once all tests are collected and none has run: what they import is there by then. A
test that asks for the fixture `processes` starts functions, scripts or modules in them. What a test says about the import
itself, or about the environment that a library reads when it is loaded, needs `subprocess`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import os
import pickle
import runpy
import select
import signal
import socket
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest
import torch

ROOM = 2**16  # bytes of a request: a function's name and its arguments
_SERVER = pytest.StashKey["Processes"]()


class Ended(NamedTuple):
    """How a process ended: the negative number of the signal that killed it, or its exit status; and what it printed."""

    status: int
    said: str


class Process:
    """One that runs."""

    def __init__(self, output: int, status: int) -> None:
        self._output, self._status = output, os.fdopen(status, "rb")
        self.pid = int(self._status.readline())

    def ends_within(self, seconds: float | None) -> bool:
        """Wait so long, or until it ends. What it prints must have room in a pipe."""
        return bool(select.select([self._status], [], [], seconds)[0])

    def kill(self) -> None:
        """By SIGKILL."""
        os.kill(self.pid, signal.SIGKILL)
        self.end()

    def end(self, seconds: float = 300) -> Ended:
        """Wait for it."""
        said = bytearray()
        while select.select([self._output], [], [], seconds)[0] and (more := os.read(self._output, ROOM)):
            said += more
        if not self.ends_within(seconds):
            os.kill(self.pid, signal.SIGKILL)
            raise TimeoutError(f"a process did not end within {seconds} seconds. It said: {said.decode(errors='replace')}")
        with self._status:
            status = int(self._status.readline())
        os.close(self._output)
        return Ended(status, said.decode(errors="replace"))


class Processes:
    """The process that the others are forked from, seen from the tests'."""

    def __init__(self) -> None:
        self._control, served = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._pid = os.fork()
        if self._pid == 0:
            _serve(served)
        served.close()

    def close(self) -> None:
        """No more of them."""
        self._control.close()
        os.waitpid(self._pid, 0)

    def start(self, function: Callable[..., object], *arguments: Any, **environment: str) -> Process:
        """Run a function that can be imported, in the tests' environment with changes."""
        request = pickle.dumps((function, arguments, {**os.environ, **environment}, os.getcwd()))
        assert len(request) < ROOM
        (output, its_output), (status, its_status) = os.pipe(), os.pipe()
        socket.send_fds(self._control, [request], [its_output, its_status])
        os.close(its_output)
        os.close(its_status)
        return Process(output, status)

    def run(self, function: Callable[..., object], *arguments: Any, **environment: str) -> str:
        """What a function prints, which must not fail."""
        status, said = self.start(function, *arguments, **environment).end()
        assert status == 0, said
        return said


def group(world: int) -> list[dict[str, str]]:
    """The environment of each of so many processes that find each other, as torchrun makes it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
    sizes = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    return [{**place, **sizes, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def script(path: Path, *arguments: str) -> None:
    """As `python path arguments` runs it."""
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.parent))
    runpy.run_path(str(path), run_name="__main__")


def module(name: str, *arguments: str) -> None:
    """As `python -m name arguments` runs it."""
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def code(text: str, *arguments: str) -> None:
    """As `python -c text arguments` runs it."""
    sys.argv = ["-c", *arguments]
    exec(compile(text, "<string>", "exec"), {"__name__": "__main__"})


def _serve(control: socket.socket) -> NoReturn:
    """Fork for each request, until the tests' process is gone. A second process waits for each, and tells its status."""
    faulthandler.disable()
    os.closerange(3, control.fileno())  # what belongs to pytest and to pytest-xdist
    os.closerange(control.fileno() + 1, 4096)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        request, descriptors, *_ = socket.recv_fds(control, ROOM, 2)
        with contextlib.suppress(ChildProcessError):  # none is left
            while os.waitpid(-1, 0 if not request else os.WNOHANG)[0]:
                pass
        if not request:
            os._exit(0)
        if os.fork() == 0:
            control.close()
            _watch(request, *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def _watch(request: bytes, output: int, status: int) -> NoReturn:
    pid = os.fork()
    if pid == 0:
        os.close(status)
        _become(request, output)
    os.close(output)
    with contextlib.suppress(BrokenPipeError):  # nobody waits any more
        os.write(status, f"{pid}\n".encode())
        _, ended = os.waitpid(pid, 0)
        os.write(status, f"{os.waitstatus_to_exitcode(ended)}\n".encode())
    os._exit(0)


def _become(request: bytes, output: int) -> NoReturn:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", 1, closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", 1, closefd=False)
    warnings.resetwarnings()
    warnings.simplefilter("ignore")
    status = 1
    try:
        function, arguments, environment, folder = pickle.loads(request)  # noqa: S301
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        torch.set_num_threads(1)
        function(*arguments)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            sys.stderr.write(error.code + "\n")
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(status)


def pytest_collection_finish(session: pytest.Session) -> None:
    if any("processes" in getattr(item, "fixturenames", ()) for item in session.items):
        importlib.import_module("torch._dynamo")  # as the first step of an optimiser does
        session.config.stash[_SERVER] = Processes()


def pytest_unconfigure(config: pytest.Config) -> None:
    if server := config.stash.get(_SERVER, None):
        server.close()


@pytest.fixture(scope="session")
def processes(pytestconfig: pytest.Config) -> Iterator[Processes]:
    """Starts processes that begin at once."""
    yield pytestconfig.stash[_SERVER]
