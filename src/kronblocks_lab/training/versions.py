"""What measured numbers depend on: versions, platform and processor."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

import kronblocks
from kronblocks.core.cache import processor


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
