"""Advice: the times of each layer dense, factored and packed, what to do, and the whole model's gain."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

from kronblocks.ops.costs.choice import milliseconds

WORTH = 1.03
"""A way must be this many times as fast as dense to be advised, or more if its timings vary more."""

_VERBS = {"dense": "keep dense", "factored": "factor", "packed": "pack"}


class Speed(NamedTuple):
    """The best plan for one way of computing a layer, and its time relative to dense in the same turns."""

    plan: str
    seconds: float  # for all rows, the least of the turns
    relative: float  # how many times as fast as dense
    spread: float  # of `relative` between thirds of the turns, plus or minus, as a share


@dataclass(frozen=True)
class Way:
    """A layer dense, factored or packed, in training (forward and backward) and inference."""

    kind: str  # "dense", "factored" or "packed"
    sparsity: float
    training: Speed
    inference: Speed
    weight_bytes: int  # of the values, and of the index if there is one

    def speed(self, training: bool) -> Speed:
        """The speed in training or in inference."""
        return self.training if training else self.inference


@dataclass(frozen=True)
class LayerAdvice:
    """The advice for all layers of one shape."""

    out_features: int
    in_features: int
    names: tuple[str, ...]
    count: int
    block_size: str
    left_dense: str  # why no block size was tried; empty otherwise
    dense: Way
    factored: Way | None
    packed: tuple[Way, ...]  # one per sparsity
    break_even_training: float | None  # least share of zero blocks at which packed beats dense; None: never
    break_even_inference: float | None

    def best(self, sparsity: float, *, training: bool) -> Way:
        """The way to use at this sparsity: dense, unless another one is clearly faster."""
        ways = [way for way in (self.factored, *self.packed) if way is not None and way.sparsity in (0.0, sparsity)]
        best = max(ways, key=lambda way: way.speed(training).relative, default=self.dense)
        speed = best.speed(training)
        return best if speed.relative >= max(WORTH, 1 + speed.spread) else self.dense

    def what_to_do(self, *, training: bool) -> str:
        """The advice in words, such as "keep dense at 50 %; pack at 90 % and 95 %"."""
        if self.left_dense:
            return f"keep dense: {self.left_dense}"
        verbs: dict[str, list[str]] = {}
        for way in self.packed:
            verb = _VERBS[self.best(way.sparsity, training=training).kind]
            verbs.setdefault(verb, []).append(percent(way.sparsity))
        if len(verbs) == 1:
            return next(iter(verbs))
        return "; ".join(f"{verb} at {' and '.join(shares)}" for verb, shares in verbs.items())


@dataclass(frozen=True)
class Gain:
    """The gain of all linear layers at one sparsity, each in its best way: speed relative to dense, and bytes of weights."""

    sparsity: float
    training: float
    inference: float
    dense_bytes: int
    weight_bytes: int  # with each layer in the way that is best for inference


@dataclass(frozen=True)
class Advice:
    """The result of `advise`. Print it for a table; `to_dict` is for JSON."""

    rows: int
    rank: int | None
    device: str
    dtype: str
    threads: int
    layers: tuple[LayerAdvice, ...]
    gains: tuple[Gain, ...]  # one per sparsity
    not_timed: tuple[str, ...] = ()  # modules with weights that are not linear layers, with their share of the model

    def to_dict(self) -> dict[str, Any]:
        """The advice as plain values, with the format's version."""
        return {"version": 2, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        lines = []
        for layer in self.layers:
            lines += [title(layer), f"  {'':15s}{'training':>36s}{'inference':>36s}{'weights':>14s}"]
            for way in (layer.dense, *filter(None, [layer.factored]), *layer.packed):
                times = "".join(
                    f"{s.plan:>12s}{milliseconds(s.seconds):>11s}{ratio(s):>13s}" for s in (way.training, way.inference)
                )
                lines.append(f"  {label(way):15s}{times}{way.weight_bytes / 2**20:10.2f} MiB")
            lines += [f"  {line}" for line in remarks(layer)] + [""]
        lines += [f"whole model at {percent(gain.sparsity)} zeros: {summary(gain)}" for gain in self.gains]
        lines += [f"not timed: {line}" for line in self.not_timed]
        rank = "of a training" if self.rank is None else self.rank
        lines += [
            f"{self.rows} rows, rank {rank}, {self.dtype}, {self.device}, {self.threads} threads. Only nn.Linear layers count.",
            "Times are the least of several turns. x: speed relative to dense, ± its spread between thirds of the turns.",
        ]
        return "\n".join(lines)


def percent(share: float) -> str:
    """A share as text, in percent."""
    return f"{100 * share:.4g} %"


def ratio(speed: Speed) -> str:
    """The speed relative to dense, and its spread.

    >>> ratio(Speed("packed", 0.001, 2.0, 0.04)), ratio(Speed("F.linear", 0.002, 1.0, 0.0))
    ('2.00x ±4%', '1.00x')
    """
    return f"{speed.relative:.2f}x" + (f" ±{100 * speed.spread:.0f}%" if speed.spread else "")


def label(way: Way) -> str:
    """The name of a way in a table."""
    return f"packed, {percent(way.sparsity)}" if way.kind == "packed" else way.kind


def title(layer: LayerAdvice) -> str:
    """The title for layers of one shape."""
    shape = f"{layer.out_features}x{layer.in_features}"
    names = ", ".join(name for name in layer.names[:3] if name != shape) + (", ..." if len(layer.names) > 3 else "")
    blocks = f" in {layer.block_size} blocks" if layer.block_size else ""
    return f"{shape}{f' * {layer.count}' if layer.count > 1 else ''}{blocks}{f' ({names})' if names else ''}"


def remarks(layer: LayerAdvice) -> list[str]:
    """What to do, and from which sparsity on it pays."""
    todo = [layer.what_to_do(training=training) for training in (True, False)]
    lines = [f"what to do: {todo[0]}"] if todo[0] == todo[1] else [f"in training: {todo[0]}", f"in inference: {todo[1]}"]
    if not layer.left_dense:
        even = [
            "never" if share is None else f"from {percent(share)} zeros on"
            for share in (layer.break_even_training, layer.break_even_inference)
        ]
        lines.append(f"packed beats dense: in training {even[0]}, in inference {even[1]}")
    return lines


def summary(gain: Gain) -> str:
    """The gain at one sparsity, as a line."""
    return (
        f"training {gain.training:.2f}x of dense's speed, inference {gain.inference:.2f}x, "
        f"weights {gain.weight_bytes / 2**20:.1f} MiB of {gain.dense_bytes / 2**20:.1f}"
    )
