"""What the products run on."""

from __future__ import annotations


def backend_key(device: str) -> str:
    """Name and version of what runs the products on a device: timings of another backend do not count."""
    return "torch"
