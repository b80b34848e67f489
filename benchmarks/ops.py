"""Time one layer, forward and backward, in every plan against nn.functional.linear: `python benchmarks/ops.py [--quick]`.

Side by side in one process, interleaved, after warm-up and after a check against the reference; medians with the range of three
repeats.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn

from kronblocks import BlockSparseLinear, KroneckerBlockLinear
from kronblocks.experiments.runs import write_json
from kronblocks.experiments.train import versions
from kronblocks.ops.cost import cost, estimated_seconds

REPEATS = 3


@dataclass(frozen=True)
class Settings:
    """What is timed."""

    out: Path = Path("benchmarks/results/ops.json")
    quick: bool = False
    threads: int = 2
    seconds: float = 0.3  # of measuring per case and repeat


def interleaved(cases: dict[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """Median milliseconds of every case, a value a repeat; all cases take turns."""
    for run in cases.values():
        run()
        run()
    medians: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(REPEATS):
        times: dict[str, list[float]] = {name: [] for name in cases}
        end = time.perf_counter() + seconds * len(cases)
        while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
            for name, run in cases.items():
                start = time.perf_counter()
                run()
                times[name].append(1e3 * (time.perf_counter() - start))
        for name, values in times.items():
            medians[name].append(statistics.median(values))
    return medians


def step(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], None]:
    """One forward and backward."""

    def run() -> None:
        layer(x).backward(dy)

    return run


def check(layer: KroneckerBlockLinear | BlockSparseLinear, x: Tensor) -> None:
    """Refuse to time what is wrong: 1e-4 is far above fp32 rounding of these sums and far below any real mistake."""
    wanted = x.double() @ layer.weight.detach().double().T
    assert layer.bias is not None
    error = (layer(x).double() - layer.bias.double() - wanted).norm() / wanted.norm()
    if not error < 1e-4:
        raise SystemExit(f"{layer} is wrong by {error:.1e}: nothing was timed")


def one(shape: tuple[int, int], block: int, rank: int, density: float, rows: int, seconds: float) -> list[dict[str, Any]]:
    """All plans of one layer."""
    (m, n), grid = shape, (shape[0] // block, shape[1] // block)
    mask = torch.rand(grid) < density
    mask[0, 0] = True
    x, dy = torch.randn(rows, n, requires_grad=True), torch.randn(rows, m)
    layers: dict[str, KroneckerBlockLinear | BlockSparseLinear] = {}
    for plan in ("dense", "tile_first", "coeff_first", "packed"):
        groups = 1 if plan == "tile_first" else grid[0]
        layers[f"factors {plan} g={groups}"] = KroneckerBlockLinear(n, m, block, rank, tile_groups=groups, plan=plan)
    for plan in ("dense", "packed"):
        layers[f"values {plan}"] = BlockSparseLinear(n, m, block, mask=mask, plan=plan)
    cases = {"F.linear": step(nn.Linear(n, m), x, dy)}
    for name, layer in layers.items():
        if isinstance(layer, KroneckerBlockLinear):
            layer.set_block_mask_(mask)
        check(layer, x.detach())
        cases[name] = step(layer, x, dy)
    times = interleaved(cases, seconds)
    dense = statistics.median(times["F.linear"])
    rows_out = []
    for name, values in times.items():
        layer = layers.get(name)
        problem = layer.problem(rows=rows) if layer else None
        rows_out.append(
            {
                "shape": [m, n],
                "block": block,
                "rank": rank,
                "density": density,
                "rows": rows,
                "case": name,
                "ms": statistics.median(values),
                "ms_range": [min(values), max(values)],
                "speed_to_dense": dense / statistics.median(values),
                "relative_macs": cost(problem, layer.active_plan).macs / (3 * rows * m * n) if layer and problem else 1.0,
                "estimated_ms": 1e3 * estimated_seconds(problem, layer.active_plan) if layer and problem else None,
            }
        )
    return rows_out


def main(settings: Settings) -> None:
    """Time, print, and write the results."""
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    shapes = [(1024, 1024)] if settings.quick else [(1024, 1024), (512, 784), (3072, 768)]
    blocks, ranks, densities, rows = (
        ([16], [1, 4], [0.1], [256]) if settings.quick else ([4, 16], [1, 4], [0.1, 0.5], [256, 2048])
    )
    results = []
    for shape, block, rank, density, count in itertools.product(shapes, blocks, ranks, densities, rows):
        print(f"\n{shape[0]}x{shape[1]}, blocks {block}x{block}, rank {rank}, density {density}, {count} rows, fp32", flush=True)
        for row in one(shape, block, rank, density, count, settings.seconds):
            low, high = row["ms_range"]
            print(f"  {row['case']:28s}{row['ms']:9.2f} ms [{low:.2f}, {high:.2f}]  {row['speed_to_dense']:5.2f}x of dense")
            results.append(row)
        write_json(settings.out, {"version": 1, "threads": settings.threads, "versions": versions(), "results": results})


if __name__ == "__main__":
    main(tyro.cli(Settings))
