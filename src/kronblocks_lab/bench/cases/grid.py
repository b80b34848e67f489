"""What `bench ops` and `bench infer` share: groups of cases on the same operands, checked, timed in turns, and written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from kronblocks.core.errors import KronblocksError
from kronblocks_lab.bench.cases import peers
from kronblocks_lab.bench.cases.grids import GridSettings, Group
from kronblocks_lab.bench.cases.ways import BOTH, DENSE, FASTKRON, FORWARD, Case
from kronblocks_lab.bench.measure.check import Truth
from kronblocks_lab.bench.measure.graphs import graphed
from kronblocks_lab.bench.measure.machine import begin, copy_rate
from kronblocks_lab.bench.measure.memory import PeakBytes
from kronblocks_lab.bench.measure.results import Results, Row, significant
from kronblocks_lab.bench.measure.timing import TIMES, Timing, measure
from kronblocks_lab.bench.settings import TimedSettings

COLUMNS = (
    "shape", "block", "density", "rows", "case", "direction", "rank", "tile_groups", "plan",
    *TIMES, "relative_macs", "gflops", "macs_bound", "bytes_bound",
)  # fmt: skip
KEY = ("shape", "block", "density", "rows", "case", "direction")
PEAK = "peak_bytes"  # one more column on a GPU


def columns_of(settings: GridSettings) -> tuple[str, ...]:
    """The columns of a row."""
    return (*COLUMNS, PEAK) if settings.device == "cuda" else COLUMNS


@dataclass(frozen=True)
class Auto:
    """What plan "auto" chooses for one direction: a case, which is timed under its own name."""

    name: str
    direction: str
    case: str


@dataclass
class Ways:
    """All ways of computing the layer of one group; the first is dense."""

    cases: list[Case]
    autos: list[Auto] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # a peer's name, and why it is not there

    def add_peers(self, found: tuple[list[Case], dict[str, str]]) -> None:
        """Other libraries' cases, and why some are missing."""
        self.cases += found[0]
        self.skipped.update(found[1])


class Operands:
    """Input and output gradient for one shape and number of rows, with the float64 results."""

    def __init__(self, group: Group, settings: TimedSettings, *, inference: bool) -> None:
        generator = torch.Generator().manual_seed(group.rows)
        self.of = (group.shape, group.rows)
        self._x, self._dy = (
            torch.randn(group.rows, n, generator=generator).to(settings.device, settings.torch_dtype)
            for n in reversed(group.shape)
        )
        self._truth = Truth(self._x, self._dy, settings.dtype)
        self._leaf = self._x.clone().requires_grad_()
        self._inference = inference

    def call(self, case: Case, direction: str) -> Callable[[], Any]:
        """The function to time."""
        if direction == BOTH:
            assert case.trained is not None
            inputs = [self._leaf, *case.trained.parameters()]
            return lambda: torch.autograd.grad(case.run(self._leaf), inputs, self._dy)

        # torch's BSR tensors cannot be used in inference mode
        mode = torch.inference_mode if self._inference and case.trained is not None else torch.no_grad

        def forward() -> Tensor:
            with mode():
                return case.run(self._x)

        return forward

    def check(self, cases: Sequence[Case], *, gradients: bool) -> None:
        """Raise KronblocksError for a case with other results."""
        expected = {id(case.source): self._truth.expect(case.source, gradients=gradients) for case in unique_sources(cases)}
        for case in cases:
            self._truth.check_output(case.name, self.call(case, FORWARD)(), expected[id(case.source)])
            if gradients and case.trained is not None:
                dx, *found = self.call(case, BOTH)()
                names = [name for name, _ in case.trained.named_parameters()]
                self._truth.check_gradients(case.name, dx, dict(zip(names, found, strict=True)), expected[id(case.source)])


def unique_sources(cases: Sequence[Case]) -> list[Case]:
    """One case for each weight."""
    return list({id(case.source): case for case in cases}.values())


def _compulsory_bytes(group: Group, case: Case, direction: str, itemsize: int) -> float:
    """Bytes that must move if each number is read or written once: x, y and the parameters; with backward, dx, dy and theirs."""
    ends = group.rows * sum(group.shape)
    return itemsize * (ends + case.parameters) * (2 if direction == BOTH else 1)


def _row(
    group: Group, case: Case, direction: str, timing: Timing, dense: Timing, machine: Mapping[str, Any], itemsize: int
) -> Row:
    dense_macs = group.rows * group.grid.weights * (3 if direction == BOTH else 1)
    macs = case.macs + (case.backward_macs if direction == BOTH else 0)
    moved = _compulsory_bytes(group, case, direction, itemsize)
    return {
        **group.key,
        "case": case.name,
        "direction": direction,
        "rank": case.rank,
        "tile_groups": case.tile_groups,
        "plan": case.plan,
        **timing.row(dense),
        "relative_macs": significant(macs / dense_macs),
        "gflops": significant(2 * macs / timing.ms / 1e6),
        "macs_bound": significant(dense_macs / macs),
        "bytes_bound": significant(dense.ms / (1e3 * moved / copy_rate(machine, moved))),
    }


def _peak(call: Callable[[], Any]) -> int:
    """Bytes of the device's memory that a call takes at the most, its result included."""
    call()
    memory = PeakBytes("cuda")
    call()
    return memory.bytes()


def _recorded(calls: Mapping[str, Callable[[], Any]], skipped: dict[str, str]) -> dict[str, Callable[[], Any]]:
    """All calls as CUDA graphs; `skipped` gets the names of those that cannot be recorded, and why."""
    found = {}
    for name, call in calls.items():
        try:
            found[name] = graphed(call)
        except RuntimeError as error:
            skipped[name] = f"no CUDA graph: {str(error).partition(chr(10))[0]}"
    return found


def time_group(
    group: Group, ways: Ways, operands: Operands, settings: GridSettings, results: Results, *, train: bool
) -> list[Row]:
    """Check, time and describe a group. Dense is timed in every group, but written only for its own."""
    operands.check(ways.cases, gradients=train)
    rows: list[Row] = []
    for direction in (FORWARD, BOTH) if train else (FORWARD,):
        cases = {case.name: case for case in ways.cases if direction == FORWARD or case.trained is not None}
        calls = {name: operands.call(case, direction) for name, case in cases.items()}
        peaks = {name: {PEAK: _peak(call)} for name, call in calls.items()} if settings.device == "cuda" else {}
        if settings.graphs:
            calls = _recorded(calls, results.head["skipped"])
        if DENSE not in calls:
            raise KronblocksError(f"{group}: dense itself cannot be timed so: {results.head['skipped'].get(DENSE)}")
        times = measure(calls, settings.budget, seed=len(results.rows), device=settings.device)
        dense, machine = times[DENSE], results.head["machine"]
        about = dense, machine, settings.torch_dtype.itemsize
        found = {
            name: {**_row(group, cases[name], direction, timing, *about), **peaks.get(name, {})} for name, timing in times.items()
        }
        for auto in ways.autos:
            if auto.direction == direction and auto.case in found:
                found[auto.name] = {**found[auto.case], "case": auto.name}
        rows += [row for name, row in found.items() if not group.second_pass or name != ways.cases[0].name]
    return rows


def _unfinished(settings: GridSettings, results: Results) -> list[Group]:
    """Groups without rows: those of a group are written all at once."""
    done = {(*(row[name] for name in KEY[:4]), row["case"] == FASTKRON) for row in results.rows}
    groups = [group for group in settings.groups() if not group.second_pass or peers.has_fastkron()]
    return [group for group in groups if (*group.key.values(), group.second_pass) not in done]


def _work(group: Group) -> float:
    """Roughly how long a group takes, in any unit."""
    return 1 + 2e-8 * group.rows * group.grid.weights


def run_grid(
    settings: GridSettings,
    ways_of: Callable[[Group], Ways],
    *,
    inference: bool = False,
    training_rows: int | None = None,
    show: Callable[[Console, Group, list[Row]], None] | None = None,
) -> Results:
    """Measure what the file lacks. It is written after every group.

    Args:
        settings: the grid.
        ways_of: the cases of a group.
        inference: forward in inference mode.
        training_rows: from this many rows on, forward + backward too; None: never.
        show: prints a finished group.
    """
    results = begin(settings, columns_of(settings), KEY)
    todo = _unfinished(settings, results)
    results.head.setdefault("skipped", {})
    console, operands = Console(stderr=True), None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=sum(map(_work, todo)))
        for group in todo:
            progress.update(task, description=str(group))
            if operands is None or operands.of != (group.shape, group.rows):
                operands = None  # the old ones first, for large ones
                operands = Operands(group, settings, inference=inference)
            ways = ways_of(group)
            results.head["skipped"].update(ways.skipped)
            train = training_rows is not None and group.rows >= training_rows and not group.second_pass
            rows = time_group(group, ways, operands, settings, results, train=train) if len(ways.cases) > 1 else []
            results.add(rows)
            if show is not None:
                show(progress.console, group, rows)
            progress.advance(task, _work(group))
    return results
