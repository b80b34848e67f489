"""The clock of a training: its seconds without evaluations, and what else the machine's processors did meanwhile."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

IDLE = 0.05
"""Share of the processors that others may use in a measurement that is called clean."""

LEAST_IDLE = 0.1
"""Processors that they may use on a small machine."""


class Reading(NamedTuple):
    """Seconds since any moment, all rising."""

    wall: float
    own: float  # of processors, in this process
    machine: float | None  # of processors, in all processes; None where the system does not tell


def reading() -> Reading:
    """The time now, once a GPU has done what it was given."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return Reading(time.perf_counter(), time.process_time(), _busy())


def _busy() -> float | None:
    """Seconds that the machine's processors have worked, or were taken by another virtual machine; Linux only."""
    try:
        name, user, nice, system, _, _, *rest = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    except (OSError, ValueError):
        return None
    worked = sum(map(int, (user, nice, system, *rest[:3])))  # interrupts and stolen time too; guests are in `user`
    return worked / os.sysconf("SC_CLK_TCK") if name == "cpu" and worked else None


@dataclasses.dataclass
class TrainingClock:
    """Adds up the time between `start` and `stop`.

    Args:
        seconds: on the clock.
        cpu_seconds: of this process's processors.
        other_seconds: of processors that others used; None where the system does not tell.
        read: gives the time.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    other_seconds: float | None = 0.0
    read: Callable[[], Reading] = reading
    _since: Reading | None = None

    def start(self) -> None:
        """Go on counting."""
        self._since = self.read()

    def stop(self) -> None:
        """Count what has passed since `start`; a clock that stands does nothing."""
        if self._since is None:
            return
        now, before, self._since = self.read(), self._since, None
        self.seconds += now.wall - before.wall
        self.cpu_seconds += (own := now.own - before.own)
        if now.machine is None or before.machine is None or self.other_seconds is None:
            self.other_seconds = None
        else:
            self.other_seconds += now.machine - before.machine - own

    def state(self) -> dict[str, float | None]:
        """What a resumed training goes on from."""
        return {name: getattr(self, name) for name in ("seconds", "cpu_seconds", "other_seconds")}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        for name, value in state.items():
            setattr(self, name, value)
        self._since = None

    def result(self, threads: int) -> dict[str, Any]:
        """What result.json says about the measurement.

        Args:
            threads: that torch uses.
        """
        cores = os.cpu_count() or 1
        others = None if self.other_seconds is None or self.seconds <= 0 else max(0.0, self.other_seconds / self.seconds)
        if others is not None and self.other_seconds is not None and self.other_seconds < -0.2 * self.cpu_seconds:
            others = None  # the system's count misses this process: it is not to be trusted
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return {**self.state(), "device": device, "cores": cores, "others": others, "quiet": _quiet(others, self, threads, cores)}


def _quiet(others: float | None, clock: TrainingClock, threads: int, cores: int) -> bool | None:
    """Whether others left the machine alone; None where nothing tells."""
    if others is not None:
        return others <= max(LEAST_IDLE, IDLE * cores)
    if threads == 1 and not torch.cuda.is_available() and clock.seconds > 0:
        return clock.cpu_seconds >= (1 - IDLE) * clock.seconds  # a single thread that never waited
    return None
