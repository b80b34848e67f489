"""`kronblocks bench account`: where the time of a training step goes, in each phase of two-phase, and what bounds each part."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from kronblocks.config.sparsity import SparsityConfig
from kronblocks.core.errors import KronblocksError
from kronblocks.nn.base import BlockLayer
from kronblocks.surgery.groups import parameter_groups
from kronblocks.surgery.lift import lift_
from kronblocks.surgery.sparsify import sparsify_
from kronblocks_lab.bench.measure.machine import begin, copy_rate, told
from kronblocks_lab.bench.measure.results import Results, Row, significant
from kronblocks_lab.bench.measure.timing import measure
from kronblocks_lab.bench.settings import TimedSettings

STEP = "whole step"
COLUMNS = ("phase", "part", "ms", "share", "bound_ms", "bound", "calls")
KEY = ("phase", "part")

_PARTS = {
    "kronblocks::packed_linear": "live blocks, forward",
    "kronblocks::packed_grad_input": "live blocks, dx",
    "kronblocks::packed_grad_values": "live blocks, dvalues",
    "kronblocks::kron_linear": "factors, forward",
    "kronblocks::kron_backward": "factors, backward",
    "kronblocks::live_blocks": "blocks built from factors",
    "kronblocks::live_blocks_backward": "blocks built from factors, backward",
    "aten::addmm": "dense layers, forward",
    "aten::mm": "dense layers, backward",
}
_OPTIMIZER, _GLUE, _CALLS = "optimizer", "activations, loss, sums", "between operators"
_PASSES = 10  # over what the optimizer updates: gradient zeroed and read, parameter and two moments read and written, and more
_MANY = 10**6  # steps that a sparsifier is told of, so that nothing is pruned while the clock runs


class Phase(NamedTuple):
    """A moment of a training; without a method it is the dense one's."""

    name: str
    method: str | None = None
    zeros: float = 0.0
    lifted: bool = False


@dataclass(frozen=True, kw_only=True)
class AccountSettings(TimedSettings):
    """Account for the time of a training step of an MLP: by phase, by product, each beside what bounds it."""

    widths: tuple[int, ...] = (784, 1024, 1024, 10)
    """Inputs, hidden sizes and classes."""
    rows: int = 256
    """Batch size."""
    block_size: str = "16"
    sparsity: float = 0.9

    kind = "account"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.widths) < 2 or min(self.widths) < 1:
            raise KronblocksError(f"--widths are at least two sizes from 1 on, not {self.widths}")
        if self.rows < 1:
            raise KronblocksError(f"--rows is a batch size from 1 on, not {self.rows}")
        if self.graphs or self.compiled or self.device != "cpu" or self.dtype != "fp32":
            raise KronblocksError("bench account looks at eager fp32 steps on the CPU: leave --device, --dtype and the like out")
        self.config("two-phase")

    def config(self, method: Any) -> SparsityConfig:
        """What the layers are made by.

        Raises:
            KronblocksError: a block size or sparsity that cannot be.
        """
        return SparsityConfig(
            method=method, block_size=self.block_size, target_sparsity=self.sparsity, on_mismatch="nearest", exclude=("last",)
        )

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The dense model first, then two-phase from its first step to its last."""
        lift = 1 - 1.3 * (1 - self.sparsity)
        return (
            Phase("dense"),
            Phase("discover, no zeros", "two-phase"),
            Phase("discover, half of the zeros", "two-phase", self.sparsity / 2),
            Phase("discover, before the lift", "two-phase", lift),
            Phase("refine, after the lift", "two-phase", lift, lifted=True),
            Phase("heal", "two-phase", self.sparsity, lifted=True),
        )

    def shared(self) -> dict[str, Any]:
        """What all rows of a file have in common."""
        own = {"widths": list(self.widths), "rows": self.rows, "block_size": self.block_size, "sparsity": self.sparsity}
        return {**super().shared(), **own}


class Training:
    """The MLP as it is in a phase, with a fused Adam, as trainings have it; called, it makes one step."""

    def __init__(self, phase: Phase, settings: AccountSettings) -> None:
        torch.manual_seed(0)
        *hidden, classes = settings.widths[1:]
        model = nn.Sequential()
        for number, (before, after) in enumerate(zip(settings.widths, hidden, strict=False)):
            model.add_module(f"layer{number}", nn.Linear(before, after))
            model.add_module(f"relu{number}", nn.ReLU())
        model.add_module("last", nn.Linear(settings.widths[-2], classes))
        self.model = model
        sparsifier = None if phase.method is None else sparsify_(model, settings.config(phase.method))
        self._kill_(phase.zeros)
        if phase.lifted:
            lift_(model)
        for layer in self.block_layers():
            layer.choose_plan_(settings.rows, measure=True)
        self._optimizer = torch.optim.Adam(parameter_groups(model, lr=1e-3), fused=True)
        if sparsifier is not None and not phase.lifted:
            sparsifier.attach(self._optimizer, total_steps=_MANY)
        self._x = torch.randn(settings.rows, settings.widths[0])
        self._labels = torch.randint(classes, (settings.rows,))

    def block_layers(self) -> list[BlockLayer]:
        """Those that are block-sparse."""
        return [layer for layer in self.model.modules() if isinstance(layer, BlockLayer)]

    def _kill_(self, zeros: float) -> None:
        """Random blocks: which they are makes no difference to the time."""
        for layer in self.block_layers():
            if zeros:
                order = torch.rand(layer.grid.shape).flatten().argsort().view(layer.grid.shape)
                layer.set_block_mask_(order >= round(zeros * layer.grid.blocks))

    def gradients(self) -> Tensor:
        """Forward and backward; the loss."""
        loss = cross_entropy(self.model(self._x), self._labels)
        loss.backward()
        return loss

    def __call__(self) -> None:
        self._optimizer.zero_grad()
        self.gradients()
        self._optimizer.step()

    def multiply_adds(self) -> dict[str, float]:
        """Of a step, by part. Torch's counter takes all blocks of factors for live: here dead ones do not count."""
        with FlopCounterMode(display=False) as counter:
            self.gradients()
        layers = self.block_layers()
        live = sum(layer.density for layer in layers) / len(layers) if layers else 1.0
        found: dict[str, float] = defaultdict(float)
        for operator, flops in counter.get_flop_counts().get("Global", {}).items():
            part = _PARTS.get(str(operator).replace(".", "::", 1), _GLUE)
            found[part] += flops / 2 * (live if part.startswith("factors") else 1.0)
        return found


def _profiled(step: Callable[[], object], steps: int) -> tuple[dict[str, float], dict[str, int]]:
    """Milliseconds and calls of a step, by part."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(steps):
            step()
    ms: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for event in recorded.key_averages():
        if event.key.startswith("Optimizer.step"):
            ms[_OPTIMIZER] += event.cpu_time_total / steps / 1e3
    inside = _inside_optimizer(recorded.events())
    for event in recorded.events() or ():
        if event.id in inside or not event.name.startswith(("aten::", "kronblocks::")):
            continue
        part = _PARTS.get(event.name, _GLUE)
        ms[part] += event.self_cpu_time_total / steps / 1e3
        calls[part] += 1
    return ms, {part: count // steps for part, count in calls.items()}


def _inside_optimizer(events: Any) -> set[int]:
    """What the optimizer called: it is counted as a whole."""
    inside: set[int] = set()
    pending = [event for event in events if event.name.startswith("Optimizer.")]
    while pending:
        event = pending.pop()
        inside.add(event.id)
        pending.extend(event.cpu_children)
    return inside


def account(phase: Phase, training: Training, ms: float, results: Results, steps: int) -> list[Row]:
    """The rows of a phase: the whole step as it was timed, and its parts, scaled from the profiler's clock to that time."""
    machine = results.head["machine"]
    parts, calls = _profiled(training, steps)
    macs = training.multiply_adds()
    updated = sum(p.numel() * p.element_size() for p in training.model.parameters()) * _PASSES
    rows = [{"phase": phase.name, "part": STEP, "ms": significant(ms), "share": 1.0, "calls": sum(calls.values())}]
    for part in (*dict.fromkeys(_PARTS.values()), _OPTIMIZER, _GLUE):
        if not parts.get(part):
            continue
        bound, why = None, ""
        if part == _OPTIMIZER:
            bound, why = 1e3 * updated / copy_rate(machine, updated), "bytes at the speed of a copy"
        elif macs.get(part):
            bound, why = 2 * macs[part] / 1e6 / machine["product_gflops"], "multiply-adds at the speed of a dense product"
        row = {"phase": phase.name, "part": part, "ms": significant(parts[part]), "share": significant(parts[part] / ms, 3)}
        rows.append({**row, "bound_ms": significant(bound), "bound": why, "calls": calls.get(part)})
    rest = max(0.0, ms - sum(parts.values()))
    return [*rows, {"phase": phase.name, "part": _CALLS, "ms": significant(rest), "share": significant(rest / ms, 3)}]


def summary(results: Results) -> Table:
    """All rows, for the screen."""
    table = Table(title=f"where a step's time goes: {results.path}", title_justify="left")
    for name in ("phase", "part", "ms", "of the step", "bound, ms", "reached"):
        table.add_column(name, justify="left" if name in ("phase", "part") else "right")
    dense = next((row["ms"] for row in results.rows if row["phase"] == "dense" and row["part"] == STEP), None)
    for row in results.rows:
        whole = row["part"] == STEP
        bound = "" if row["bound_ms"] is None else f"{row['bound_ms']:.2f}"
        reached = "" if row["bound_ms"] is None else f"{row['bound_ms'] / row['ms']:.0%}"
        share = f"{row['ms'] / dense:.2f} of dense" if whole and dense else f"{row['share']:.0%}"
        table.add_row(row["phase"] if whole else "", row["part"], f"{row['ms']:.2f}", share, bound, reached)
    return table


def run(settings: AccountSettings) -> Results:
    """Time the phases in turns, then look into each."""
    results = begin(settings, COLUMNS, KEY)
    wanted = [phase for phase in settings.phases if results.missing([{"phase": phase.name, "part": STEP}])]
    if not wanted:
        return results
    with told() as show:
        show("building the phases, measuring plans")
        trainings = {phase.name: Training(phase, settings) for phase in settings.phases}
        show("timing the steps, in turns")
        times = measure(trainings, settings.budget, seed=settings.rows, device="cpu")
        for phase in settings.phases:
            show(f"looking into: {phase.name}")
            steps = 3 if settings.quick else 20
            results.add(account(phase, trainings[phase.name], times[phase.name].ms, results, steps))
    return results
