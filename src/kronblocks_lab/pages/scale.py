"""The table of docs/scale.md: memory and traffic of a 70B model under fully_shard, on paper, from the formulas there."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from kronblocks_lab.bench.page.tables import fill, table
from kronblocks_lab.pages import ROOT

PAGE = ROOT / "docs" / "scale.md"


class Layer(NamedTuple):
    """A linear layer, and how many of them there are."""

    out_features: int
    in_features: int
    number: int


LAYERS = 80
LINEAR = (
    Layer(8192, 8192, 2 * LAYERS),
    Layer(1024, 8192, 2 * LAYERS),
    Layer(28672, 8192, 2 * LAYERS),
    Layer(8192, 28672, LAYERS),
)
OTHER = 2 * 32_000 * 8192  # embedding and head
BLOCK, RANK, TARGET, AT_LIFT = 64, 8, 0.1, 0.13
RANKS = (64, 256)
BYTES = 16  # fp32 parameter, gradient and two moments
GIB, GB = 2**30, 1e9


def trained(phase: str) -> float:
    """Parameters that are trained, of the linear layers."""
    total = 0.0
    for layer in LINEAR:
        weights = layer.out_features * layer.in_features
        rows, columns = layer.out_features // BLOCK, layer.in_features // BLOCK
        factors = rows * columns * RANK + rows * RANK * BLOCK**2  # coefficients, and a bank of tiles for each block row
        total += (
            layer.number * {"dense": weights, "discover": factors, "refine": AT_LIFT * weights, "heal": TARGET * weights}[phase]
        )
    return total


def blocks() -> int:
    """Blocks of the model."""
    return sum(layer.number * layer.out_features * layer.in_features // BLOCK**2 for layer in LINEAR)


def phases() -> list[str]:
    """A row for each phase."""
    columns = ["phase", "parameters trained, linear layers", *(f"GiB a rank, {n} ranks" for n in RANKS), "GB a rank and step"]
    lines = []
    for phase in ("dense", "discover", "refine", "heal"):
        parameters = trained(phase) + OTHER
        held = [BYTES * parameters / n + (0 if phase == "dense" else blocks()) for n in RANKS]
        traffic = 6 * parameters + (0 if phase == "dense" else 12 * blocks() / 50)
        numbers = [f"{each / GIB:.1f}" for each in held]
        lines.append([phase, f"{trained(phase) / 1e9:.1f} B", *numbers, f"{traffic / GB:.0f}"])
    return table(columns, lines)


def pages() -> dict[Path, str]:
    """The page with its table, as it should be."""
    return {PAGE: fill(PAGE.read_text(), "scale", phases())}
