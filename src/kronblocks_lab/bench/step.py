"""`kronblocks bench step`: one whole training step of an MLP, and the peak memory of some steps in a process of its own."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kronblocks.core.errors import KronblocksError
from kronblocks_lab.bench.cases.models import CLASSES, QUICK, Mlp, Place, StepModel, plan_of, step_models
from kronblocks_lab.bench.cases.work import Work, count_work
from kronblocks_lab.bench.measure.check import dense_weight
from kronblocks_lab.bench.measure.graphs import graphed
from kronblocks_lab.bench.measure.machine import begin, told, use
from kronblocks_lab.bench.measure.memory import PeakBytes, alone
from kronblocks_lab.bench.measure.results import Results, Row, significant
from kronblocks_lab.bench.measure.timing import TIMES, measure
from kronblocks_lab.bench.page.tables import roof
from kronblocks_lab.bench.settings import StepSettings

COLUMNS = (
    *("rows", "case", "plan", "parameters", *TIMES),
    *("peak_bytes", "first_loss", "last_loss", "gflops", "macs_bound", "bytes_bound"),
)
KEY = ("rows", "case")
# of a gradient's root mean square: fp32 errs by about 1e-5 of it, tf32 by 1e-3 and bf16 by 1e-2, and a ReLU near 0 may fall to
# either side, which of the lower precisions many do
_TOLERANCES = {"fp32": 1e-3, "tf32": 3e-2, "bf16": 2e-1}


class Batch(NamedTuple):
    """Inputs (rows, width) and classes (rows,)."""

    x: Tensor
    labels: Tensor


def _place(settings: StepSettings) -> Place:
    return Place(settings.device, settings.torch_dtype)


def make_batch(rows: int, width: int, place: Place) -> Batch:
    """Random inputs, with the classes that a random linear map gives them."""
    generator = torch.Generator().manual_seed(rows)
    x, teacher = (torch.randn(n, width, generator=generator) for n in (rows, CLASSES))
    return Batch(x.to(*place), (x @ teacher.t()).argmax(1).to(place.device))


class Training:
    """A model and its Adam; called, it makes one step and returns the loss."""

    def __init__(self, kind: StepModel, settings: StepSettings, batch: Batch) -> None:
        torch.manual_seed(0)
        self.model = Mlp(kind, settings.width, len(batch.x), _place(settings))
        self._forward = torch.compile(self.model, dynamic=False) if kind.compiled else self.model
        self._batch, self._tolerance = batch, _TOLERANCES[settings.dtype]
        self._optimizer = torch.optim.Adam(
            self.model.parameters(), lr=1e-3, fused=settings.fused or None, capturable=settings.graphs
        )
        self._step = self._plain_step

    def record_(self, name: str) -> None:
        """Make every further step the replay of a CUDA graph.

        Raises:
            KronblocksError: it cannot be one.
        """
        try:
            self._step = graphed(self._plain_step)
        except RuntimeError as error:
            raise KronblocksError(f"{name} cannot be a CUDA graph ({error}): name the others with --cases") from error

    def loss(self, forward: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Cross-entropy, and the penalty where there is one; of another forward than that of a step where one is given."""
        return cross_entropy((forward or self._forward)(self._batch.x), self._batch.labels) + self.model.penalty()

    def _plain_step(self) -> Tensor:
        self._optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        self._optimizer.step()
        return loss.detach()

    def __call__(self) -> Tensor:
        return self._step()

    def work(self) -> Work:
        """Of a step, counted without a compiler."""

        def run() -> None:
            torch.autograd.grad(self.loss(self.model), list(self.model.parameters()))

        return count_work(self.model, run, self._batch.x.element_size(), training=True)

    def check(self, name: str) -> None:
        """Refuse a model whose loss or gradients are not those of float64 with dense weights.

        Raises:
            KronblocksError: they are not.
        """
        parameters = list(self.model.parameters())
        loss = self.loss()
        found = torch.autograd.grad(loss, parameters)
        exact = copy.deepcopy(self.model).double()
        x = self._batch.x.double()
        for layer in exact.large:
            x = torch.relu(nn.functional.linear(x, dense_weight(layer), layer.get_parameter("bias")))
        wanted_loss = cross_entropy(exact.last(x), self._batch.labels) + exact.penalty()
        wanted = torch.autograd.grad(wanted_loss, list(exact.parameters()))
        for what, got, want in zip(
            ("loss", *dict(exact.named_parameters())), (loss, *found), (wanted_loss, *wanted), strict=True
        ):
            size, error = (float(each.detach().square().mean().sqrt()) for each in (want, got - want))
            error = error / size if size > 0 else error
            if not error <= self._tolerance:
                raise KronblocksError(f"{name}: {what} is wrong by {error:.1e} of its size: nothing was timed")


def train_some(kind_name: str, settings: StepSettings, rows: int) -> dict[str, Any]:
    """Some steps, for a process of its own: peak bytes above the loaded data, first and last loss."""
    use(settings)
    models = step_models(settings)
    kind = next(each for each in models if each.name == kind_name)
    batch = make_batch(rows, settings.width, _place(settings))
    warm = Training(models[0], settings, Batch(batch.x[:8], batch.labels[:8]))  # libraries' own buffers are no one's cost
    warm()
    del warm
    gc.collect()
    memory = PeakBytes(settings.device)
    training = Training(kind, settings, batch)
    losses = [float(training()) for _ in range(settings.steps)]
    return {"peak_bytes": memory.bytes(), "first_loss": significant(losses[0]), "last_loss": significant(losses[-1])}


def chosen_models(settings: StepSettings) -> list[StepModel]:
    """The models asked for; dense always, since the others are compared with it."""
    models = step_models(settings)
    wanted = settings.cases if settings.cases is not None else (QUICK if settings.quick and not settings.authors else ("",))
    unknown = [part for part in wanted if all(part not in model.name for model in models)]
    if unknown:
        names = "; ".join(model.name for model in models)
        raise KronblocksError(f"--cases {unknown[0]!r} is part of no case's name: there are {names}")
    return [models[0]] + [model for model in models[1:] if any(part in model.name for part in wanted)]


def _same_plan(name: str, plan: str | None, names: Collection[str]) -> str | None:
    """The fixed case that an "auto" comes down to, if it is among those timed."""
    if name.startswith("auto "):
        fixed = name.replace("auto", "packed", 1) if plan == "packed" else name
    else:
        fixed = f"{name.removesuffix('auto')}{plan}" if name.endswith(" auto") else name
    return fixed if fixed != name and fixed in names else None


def measure_batch(
    settings: StepSettings, kinds: list[StepModel], rows: int, machine: Mapping[str, Any], progress: Callable[[str], None]
) -> list[Row]:
    """All models at one batch size: checked, timed in turns, then each alone for memory and loss."""
    batch = make_batch(rows, settings.width, _place(settings))
    trainings = {kind.name: Training(kind, settings, batch) for kind in kinds}
    plans = {name: plan_of(training.model) for name, training in trainings.items()}
    parameters = {name: sum(p.numel() for p in training.model.parameters()) for name, training in trainings.items()}
    aliases = {name: _same_plan(name, plans[name], trainings) for name in trainings}
    trainings = {name: training for name, training in trainings.items() if aliases[name] is None}
    work: dict[str, Work] = {}
    for name in trainings:
        progress(f"{rows:,} rows, checking {name}")
        trainings[name].check(name)
        work[name] = trainings[name].work()
        if settings.graphs:
            trainings[name].record_(name)
    progress(f"{rows:,} rows, timing")
    times = measure(trainings, settings.budget, seed=rows, device=settings.device)
    trainings.clear()
    gc.collect()
    found: dict[str, Row] = {}
    for name, timing in times.items():
        found[name] = {
            "rows": rows,
            "case": name,
            "plan": plans[name],
            "parameters": parameters[name],
            **timing.row(times["dense"]),
            **work[name].bounds(timing.ms, times["dense"].ms, machine),
        }
        if settings.memory:
            progress(f"{rows:,} rows, memory of {name}")
            found[name].update(alone(settings.device, train_some, name, settings, rows))
    for name, alias in aliases.items():
        if alias is not None:
            found[name] = {**found[alias], "case": name}
    return [found[kind.name] for kind in kinds]


def summary(results: Results) -> Table:
    """All rows, for the screen."""
    table = Table(title=f"one training step: {results.path}", title_justify="left")
    for name in ("rows", "case", "plan", "ms", "speed to dense", "repeats", "roof", "peak MiB", "first loss", "last loss"):
        table.add_column(name, justify="left" if name in ("case", "plan") else "right")
    for row in results.rows:
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
        spread = f"{row['speed_low']:.2f}-{row['speed_high']:.2f}"
        losses = ["" if row[name] is None else f"{row[name]:.3f}" for name in ("first_loss", "last_loss")]
        cells = [f"{row['rows']:,}", row["case"], row["plan"] or "", f"{row['ms']:.2f}", f"{row['speed']:.2f}", spread]
        table.add_row(*cells, roof(row), peak, *losses)
    return table


def run(settings: StepSettings) -> Results:
    """Measure what is missing, and write it; a batch size whose every case is there is done."""
    kinds = chosen_models(settings)
    results = begin(settings, COLUMNS, KEY)
    with told() as show:
        for rows in settings.batches:
            if results.missing([{"rows": rows, "case": kind.name} for kind in kinds]):
                machine = results.head["machine"]
                results.add(measure_batch(settings, kinds, rows, machine, show))
    return results
