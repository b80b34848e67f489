"""Curves of quality over time, from the evaluations during trainings: when a quality was reached, and the best by some time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kronblocks_lab.report.costs import number


class Axis(NamedTuple):
    """What passes while a model trains."""

    key: str  # in evaluations
    name: str
    unit: str
    scale: float  # of a value in that unit

    @property
    def label(self) -> str:
        """Of a picture's axis."""
        return self.name if self.scale == 1 else f"{self.name}, {self.unit}"


SECONDS = Axis("seconds", "seconds of training", "s", 1)
CPU_SECONDS = Axis("cpu_seconds", "CPU seconds of training", "CPU s", 1)
MACS = Axis("training_macs", "counted multiply-adds of training", "G", 1e9)

AXES = {axis.key: axis for axis in (SECONDS, CPU_SECONDS, MACS)}


class Curve(NamedTuple):
    """Quality on validation data against what passed, in the axis's unit; in order, finite.

    `from_` is the first point from which the model has the zeros that were asked for: what it was before is no sparse model.
    `diverged` says that the last evaluation was not finite, so that the curve ends before the training.
    """

    x: np.ndarray
    y: np.ndarray
    from_: int = 0
    diverged: bool = False

    @property
    def end(self) -> float:
        """When the training ended."""
        return float(self.x[-1])

    @property
    def final(self) -> float:
        """Quality at the end."""
        return float(self.y[-1])


def curve_of(result: dict[str, Any], axis: Axis, quality: str) -> Curve | None:
    """The curve of a training; None where its result.json has no such numbers.

    Args:
        result: holds `evaluations`, or in its history those after the epochs.
        axis: what passes.
        quality: name of the numbers in the evaluations.
    """
    points, diverged = [], False
    least = -math.inf if result["config"]["method"] == "dense" else result["config"]["sparsity"] - 1e-6
    for each in result.get("evaluations") or result["history"]:
        point = (number(each.get(axis.key)) / axis.scale, number(each.get(quality)))
        diverged = not math.isfinite(point[1])
        if all(map(math.isfinite, point)):
            points.append((*point, number(each.get("block_sparsity")) >= least))
    if not points:
        return None
    x, y, is_sparse = (np.array(values, dtype=float) for values in zip(*points, strict=True))
    before = np.flatnonzero(is_sparse == 0)
    return Curve(x, y, int(before[-1]) + 1 if len(before) else 0, diverged)


def first_reached(curve: Curve, target: float, *, more_is_better: bool) -> float | None:
    """When a sparse model first reached a quality, interpolated between evaluations; None if none did.

    >>> first_reached(Curve(np.array([1.0, 2.0, 4.0]), np.array([3.0, 2.0, 1.0])), 1.5, more_is_better=False)
    3.0
    """
    x, y = curve.x[curve.from_ :], curve.y[curve.from_ :]
    above = np.flatnonzero((1 if more_is_better else -1) * (y - target) >= 0)
    if not len(above):
        return None
    place = int(above[0])
    if place == 0:
        return float(x[0])
    (x0, x1), (y0, y1) = x[place - 1 : place + 1], y[place - 1 : place + 1]
    return float(x0 + (x1 - x0) * (target - y0) / (y1 - y0))


def best_by(curve: Curve, limit: float, *, more_is_better: bool) -> float | None:
    """The best quality of a sparse model until some time, interpolated there between evaluations; None before the first one.

    >>> best_by(Curve(np.array([1.0, 2.0, 4.0]), np.array([3.0, 2.0, 1.0])), 3.0, more_is_better=False)
    1.5
    """
    x, y = curve.x[curve.from_ :], curve.y[curve.from_ :]
    if not len(x) or limit < x[0]:
        return None
    values = [*y[x <= limit], np.interp(limit, x, y)]
    return float(max(values) if more_is_better else min(values))


def mean_curve(curves: Sequence[Curve]) -> tuple[Curve, np.ndarray]:
    """The mean over trainings where all have values, and the sample standard deviation, zero of a single one.

    It counts as sparse from where all are.
    """
    low, high = max(curve.x[0] for curve in curves), min(curve.end for curve in curves)
    x = np.unique(np.concatenate([curve.x for curve in curves]))
    x = x[(x >= low) & (x <= high)]
    if not len(x):  # they do not overlap
        x = np.array([high])
    y = np.stack([np.interp(x, curve.x, curve.y) for curve in curves])
    sparse = max(curve.x[curve.from_] if curve.from_ < len(curve.x) else math.inf for curve in curves)
    spread = y.std(0, ddof=1) if len(curves) > 1 else np.zeros(len(x))
    return Curve(x, y.mean(0), int(np.searchsorted(x, sparse))), spread
