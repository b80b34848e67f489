"""`kronblocks bench model`: training steps and inference of a vision transformer, dense and in each phase of two-phase."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kronblocks.config.methods import Method
from kronblocks.config.sparsity import SparsityConfig
from kronblocks.core.errors import KronblocksError
from kronblocks.deploy.exporting import export
from kronblocks.surgery.groups import parameter_groups
from kronblocks.surgery.sparsify import densify_, sparsify_
from kronblocks_lab.bench.cases.work import Work, count_work
from kronblocks_lab.bench.measure.machine import begin, told, use
from kronblocks_lab.bench.measure.memory import PeakBytes, alone
from kronblocks_lab.bench.measure.results import Results, Row, significant
from kronblocks_lab.bench.measure.timing import TIMES, Timing, measure
from kronblocks_lab.bench.page.tables import roof
from kronblocks_lab.bench.settings import TimedSettings
from kronblocks_lab.training.vision import TransformerName, image_transformer

COLUMNS = (
    *("direction", "case", "parameters", *TIMES),
    *("images_per_second", "peak_bytes", "first_loss", "last_loss", "gflops", "macs_bound", "bytes_bound"),
)
KEY = ("direction", "case")
CLASSES = 100
TRAINING, INFERENCE = "training step", "inference"
DENSE, COMPILED, FACTORS, BLOCKS = (
    "dense",
    "dense, compiled",
    "two-phase, discover (factors)",
    "two-phase, after the lift (live blocks)",
)
_STEPS = 3  # of the process whose peak memory counts
_TOLERANCES = {"fp32": 1e-4, "tf32": 5e-2, "bf16": 5e-2}  # of exported outputs, which rounding alone moves by so much
_MANY = 10**6  # steps that a sparsifier is told of, so that nothing is pruned while the clock runs


@dataclass(frozen=True, kw_only=True)
class ModelSettings(TimedSettings):
    """Time training steps and inference of a whole vision transformer, dense and block-sparse, with their peak memory.

    With --dtype bf16 training keeps weights in fp32 and takes products under autocast; inference has bf16 weights.
    """

    model: TransformerName = "vit-tiny"
    image_size: int = 224
    """Pixels of a side."""
    batch_size: int | None = None
    """Images a step; unset: 16, and 2 with --quick."""
    block_size: str = "16"
    sparsity: float = 0.9

    kind = "model"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images < 1:
            raise KronblocksError(f"--batch-size must be at least 1, not {self.batch_size}")
        if self.graphs:
            raise KronblocksError("bench model takes whole models as they are trained: leave --graphs out")
        self.sparse("static")

    @property
    def name(self) -> str:
        """Of the file, without its ending."""
        return super().name.replace(self.kind, f"{self.kind}-{self.model}", 1)

    @property
    def images(self) -> int:
        """Of a step."""
        return self.batch_size if self.batch_size is not None else (2 if self.quick else 16)

    def sparse(self, method: Method) -> SparsityConfig:
        """What the block-sparse models are made by.

        Raises:
            KronblocksError: a block size or sparsity that cannot be.
        """
        return SparsityConfig(
            method=method,
            block_size=self.block_size,
            target_sparsity=self.sparsity,
            on_mismatch="nearest",
            exclude=("*classifier",),
        )

    def shared(self) -> dict[str, Any]:
        """What all rows of a file have in common."""
        own = {"model": self.model, "image_size": self.image_size, "batch_size": self.images}
        return {**super().shared(), **own, "block_size": self.block_size, "sparsity": self.sparsity}


class Training:
    """A model and its AdamW; called, it makes one step and returns the loss.

    The live blocks of the phase after the lift are random ones: which they are makes no difference to the time.
    """

    def __init__(self, case: str, settings: ModelSettings) -> None:
        torch.manual_seed(0)
        model = image_transformer(settings.model, 3, CLASSES, settings.image_size).to(settings.device)
        if case in (FACTORS, BLOCKS):
            sparsifier = sparsify_(model, settings.sparse("two-phase" if case == FACTORS else "static"))
            self._optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-4))
            sparsifier.attach(self._optimizer, total_steps=_MANY)
        else:
            self._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        self.model: nn.Module = model
        self._forward = torch.compile(model, dynamic=False) if case == COMPILED else model
        self._autocast = autocast(settings)
        generator = torch.Generator().manual_seed(0)
        shape = settings.images, 3, settings.image_size, settings.image_size
        self.images = torch.randn(shape, generator=generator).to(settings.device)
        self._labels = torch.randint(CLASSES, (settings.images,), generator=generator).to(settings.device)

    def __call__(self) -> Tensor:
        self._optimizer.zero_grad()
        loss = self._loss(self._forward)
        loss.backward()
        self._optimizer.step()
        return loss.detach()

    def _loss(self, forward: Callable[[Tensor], Tensor]) -> Tensor:
        with self._autocast():
            return cross_entropy(forward(self.images).float(), self._labels)

    def work(self, itemsize: int) -> Work:
        """Of a step, counted without a compiler."""

        def run() -> None:
            torch.autograd.grad(self._loss(self.model), [p for p in self.model.parameters() if p.requires_grad])

        return count_work(self.model, run, itemsize, training=True)

    @property
    def parameters(self) -> int:
        """That are trained."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)


def autocast(settings: ModelSettings) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """In what precision products are taken."""
    if settings.dtype != "bf16":
        return contextlib.nullcontext
    return lambda: torch.autocast(settings.device, torch.bfloat16)


def cases(settings: ModelSettings) -> list[str]:
    """Of training, dense first."""
    return [DENSE, *([COMPILED] if settings.compiled else []), FACTORS, BLOCKS]


def train_some(case: str, settings: ModelSettings) -> dict[str, Any]:
    """Some steps, for a process of its own: peak bytes above what was there before the model, first and last loss."""
    use(settings)
    torch.ones(8, 8, device=settings.device).mm(torch.ones(8, 8, device=settings.device))  # libraries are no one's cost
    gc.collect()
    memory = PeakBytes(settings.device)
    training = Training(case, settings)
    losses = [float(training()) for _ in range(_STEPS)]
    return {"peak_bytes": memory.bytes(), "first_loss": significant(losses[0]), "last_loss": significant(losses[-1])}


def _timed(direction: str, case: str, timing: Timing, dense: Timing, images: int, work: Work, machine: Mapping[str, Any]) -> Row:
    per_second = {"images_per_second": significant(1e3 * images / timing.ms)}
    return {"direction": direction, "case": case, **timing.row(dense), **per_second, **work.bounds(timing.ms, dense.ms, machine)}


def measure_training(settings: ModelSettings, machine: Mapping[str, Any], progress: Callable[[str], None]) -> list[Row]:
    """Training steps in turns, then each model alone for its peak memory."""
    trainings: dict[str, Training] = {}
    work: dict[str, Work] = {}
    for case in cases(settings):
        progress(f"making {case}")
        trainings[case] = Training(case, settings)
        trainings[case]()  # by the end of the first step plans are chosen
        work[case] = trainings[case].work(settings.torch_dtype.itemsize)
    progress("timing training steps")
    times = measure(trainings, settings.budget, device=settings.device)
    parameters = {case: training.parameters for case, training in trainings.items()}
    trainings.clear()
    gc.collect()
    rows = []
    for case, timing in times.items():
        progress(f"memory of {case}")
        row = _timed(TRAINING, case, timing, times[DENSE], settings.images, work[case], machine)
        rows.append({**row, "parameters": parameters[case], **alone(settings.device, train_some, case, settings)})
    return rows


def measure_inference(settings: ModelSettings, machine: Mapping[str, Any], progress: Callable[[str], None]) -> list[Row]:
    """A model with live blocks as `export` ships it, beside the same weights in a dense one, in bf16 where that is asked for."""
    progress("exporting")
    training = Training(BLOCKS, settings)
    sparse = training.model.eval().requires_grad_(False).to(settings.torch_dtype)
    images = training.images.to(settings.torch_dtype)
    exported = export(sparse, images, tolerance=_TOLERANCES[settings.dtype])
    densify_(sparse)
    models = {DENSE: sparse, "exported": exported.model}

    def call(model: nn.Module) -> Callable[[], Tensor]:
        return lambda: model(images)

    progress("timing inference")
    with torch.inference_mode():
        work = {name: count_work(model, call(model), images.element_size(), training=False) for name, model in models.items()}
        times = measure({name: call(model) for name, model in models.items()}, settings.budget, device=settings.device)

    def row(name: str) -> Row:
        return _timed(INFERENCE, name, times[name], times[DENSE], settings.images, work[name], machine)

    return [{**row(name), "parameters": _stored(model)} for name, model in models.items()]


def _stored(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def summary(results: Results) -> Table:
    """All rows, for the screen."""
    table = Table(title=f"a whole model: {results.path}", title_justify="left")
    for name in (
        "what",
        "case",
        "ms",
        "images/s",
        "speed to dense",
        "repeats",
        "roof",
        "parameters",
        "peak MiB",
        "first loss",
        "last loss",
    ):
        table.add_column(name, justify="left" if name in ("what", "case") else "right")
    for row in results.rows:
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
        spread = f"{row['speed_low']:.2f}-{row['speed_high']:.2f}"
        losses = ["" if row[name] is None else f"{row[name]:.3f}" for name in ("first_loss", "last_loss")]
        cells = [row["direction"], row["case"], f"{row['ms']:.1f}", f"{row['images_per_second']:.1f}", f"{row['speed']:.2f}"]
        table.add_row(*cells, spread, roof(row), f"{row['parameters']:,}", peak, *losses)
    return table


def run(settings: ModelSettings) -> Results:
    """Measure what is missing, and write it."""
    results = begin(settings, COLUMNS, KEY)
    with told() as show:
        if results.missing([{"direction": TRAINING, "case": case} for case in cases(settings)]):
            results.add(measure_training(settings, results.head["machine"], show))
        if results.missing([{"direction": INFERENCE, "case": DENSE}]):
            results.add(measure_inference(settings, results.head["machine"], show))
    return results
