"""What measured numbers depend on: versions, platform and processor."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

import torch

import kronblocks


def versions() -> dict[str, str]:
    """What the numbers depend on."""
    return {
        "kronblocks": kronblocks.__version__,
        "torch": torch.__version__,
        "lightning": importlib.metadata.version("lightning"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
    }


def processor() -> str:
    """The CPU's name, as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
