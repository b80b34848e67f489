"""`kronblocks bench short`: a GPU's check, its tests, and one shape of everything that counts there, in eight minutes.

Parts run in order, each is written when it is done, and what fails is written too: minutes on a GPU are rare. `--quick` has sizes
that a CPU computes in seconds, so that what is run on a GPU has run before.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table

from kronblocks.advice.doctor import as_json, examine
from kronblocks.core.errors import KronblocksError
from kronblocks_lab.bench.cases.decoder import Decoder, decoder_rows
from kronblocks_lab.bench.cases.grid import COLUMNS as GRID_COLUMNS
from kronblocks_lab.bench.cases.grid import Operands, Ways, time_group
from kronblocks_lab.bench.cases.grids import Group, OpsSettings
from kronblocks_lab.bench.cases.ways import dense_case, factors_layer, peer_cases, random_mask, values_layer
from kronblocks_lab.bench.measure.machine import begin, told, use
from kronblocks_lab.bench.measure.results import Results, Row
from kronblocks_lab.bench.measure.timing import TIMES
from kronblocks_lab.bench.ops import add_layer
from kronblocks_lab.bench.settings import StepSettings, TimedSettings
from kronblocks_lab.bench.step import chosen_models, measure_batch
from kronblocks_lab.bench.whole_model import ModelSettings, measure_inference, measure_training
from kronblocks_lab.training.models import TransformerName

COLUMNS = ("part", "case", "direction", "plan", *TIMES, "peak_bytes", "first_loss", "last_loss", "macs_bound", "bytes_bound")
KEY = ("part", "case", "direction")
STEP = "training step"
TESTS = Path("tests/gpu")
_TESTS_SECONDS, _KEPT_SECONDS = 180, 210  # of the tests at the most, and of what the other parts are left
_STEPS = 3  # of what shows a model's memory and loss


class Sizes(NamedTuple):
    """What the parts measure."""

    width: int  # of the authors' MLP
    many: int  # rows
    few: int
    layer: str
    layer_rows: int
    packed_rows: int
    block: int
    model: TransformerName
    image_size: int
    images: int
    decoder: Decoder


FULL = Sizes(1024, 20_000, 256, "4096x4096", 20_000, 16_384, 64, "vit-base", 224, 64, Decoder(2048, 4, 5632, 32_000, 8, 1024, 32))
TINY = Sizes(64, 64, 16, "64x128", 32, 32, 16, "vit-tiny", 32, 2, Decoder(64, 1, 128, 64, 2, 8, 16))


@dataclass(frozen=True, kw_only=True)
class ShortSettings(TimedSettings):
    """A GPU in eight minutes: kronblocks doctor, tests/gpu, and one shape of each claim, all beside dense."""

    minutes: float = 8.0
    """After these no further part begins."""
    tune: bool = False
    """Measure again with tuned sizes of launches (KRONBLOCKS_TUNE=1), without check and tests, into a file of its own."""

    kind = "short"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.minutes < float("inf"):
            raise KronblocksError(f"--minutes is a time above 0, not {self.minutes}")
        if self.device == "cpu" and not self.quick:
            raise KronblocksError("bench short is for a GPU: add --device cuda, or --quick to see whether it runs")
        if self.graphs or self.compiled or self.dtype != "fp32":
            raise KronblocksError("bench short has precisions and graphs of its own: leave --dtype, --graphs and --compiled out")

    @property
    def variant(self) -> list[str]:
        """Each has its own file."""
        told = {"cuda": self.device == "cuda", "tuned": self.tune}
        return [name for name, is_told in told.items() if is_told]

    @property
    def sizes(self) -> Sizes:
        """What is measured."""
        return TINY if self.quick else FULL

    def shared(self) -> dict[str, Any]:
        """What all rows of a file have in common."""
        sizes = {name: list(value) if isinstance(value, tuple) else value for name, value in self.sizes._asdict().items()}
        return {**super().shared(), **sizes, "tune": self.tune}

    def common(self) -> dict[str, Any]:
        """What the parts' settings take over."""
        names = ("device", "threads", "seconds", "repeats")
        return {name: getattr(self, name) for name in names}


Tell = Callable[[str], None]
Part = Callable[[ShortSettings, Results, Tell], list[Row]]


def _authors(rows: int, *, graphs: bool) -> Part:
    def part(settings: ShortSettings, results: Results, tell: Tell) -> list[Row]:
        gpu = settings.device == "cuda"
        own = StepSettings(
            **settings.common(),
            authors=True,
            rows=(rows,),
            width=settings.sizes.width,
            cases=("factors r=1 8x8", "factors r=4 8x8"),
            graphs=graphs and gpu,
            memory=gpu,
            loss_steps=_STEPS,
        )
        use(own)
        found = measure_batch(own, chosen_models(own), rows, results.head["machine"], tell)
        return [{**row, "direction": STEP} for row in found]

    return part


def _layer(
    settings: ShortSettings, results: Results, rows: int, density: float, fill: Callable[[Ways, Group], None]
) -> list[Row]:
    """A layer in bf16, beside dense."""
    sizes = settings.sizes
    block = str(sizes.block)
    own = OpsSettings(
        **settings.common(), dtype="bf16", shapes=(sizes.layer,), blocks=(block,), rows=(rows,), densities=(density,), ranks=(4,)
    )
    use(own)
    (group,) = own.groups()
    ways = Ways([dense_case(group.grid, rows, own.device, own.torch_dtype)])
    fill(ways, group)
    found = time_group(group, ways, Operands(group, own, inference=False), own, results, train=True)
    results.head["skipped"].update(ways.skipped)
    return [{name: row.get(name) for name in (*GRID_COLUMNS, "peak_bytes")} for row in found]


def _factors(settings: ShortSettings, results: Results, tell: Tell) -> list[Row]:
    def fill(ways: Ways, group: Group) -> None:
        mask = torch.ones(group.grid.shape, dtype=torch.bool)
        add_layer(ways, "factors r=4", factors_layer(group.grid, mask, 4, False, settings.device, torch.bfloat16), group.rows)

    return _layer(settings, results, settings.sizes.layer_rows, 1.0, fill)


def _packed(settings: ShortSettings, results: Results, tell: Tell) -> list[Row]:
    def fill(ways: Ways, group: Group) -> None:
        mask = random_mask(group.grid, group.density, torch.Generator().manual_seed(0))
        layer = values_layer(group.grid, mask, settings.device, torch.bfloat16)
        add_layer(ways, "values", layer, group.rows)
        ways.add_peers(peer_cases(layer, group.rows))

    return _layer(settings, results, settings.sizes.packed_rows, 0.1, fill)


def _transformer(settings: ShortSettings, results: Results, tell: Tell) -> list[Row]:
    sizes, gpu = settings.sizes, settings.device == "cuda"
    own = ModelSettings(
        **settings.common(),
        dtype="bf16" if gpu else "fp32",
        model=sizes.model,
        image_size=sizes.image_size,
        batch_size=sizes.images,
        block_size=str(sizes.block),
    )
    use(own)
    machine = results.head["machine"]
    return measure_training(own, machine, tell) + measure_inference(own, machine, tell)


def _decoder(settings: ShortSettings, results: Results, tell: Tell) -> list[Row]:
    use(settings)
    return decoder_rows(settings.sizes.decoder, settings.device, settings.budget, tell)


def parts(sizes: Sizes) -> dict[str, Part]:
    """What is measured, in order, by name."""
    many, few = sizes.many, sizes.few
    return {
        f"authors' MLP, {many:,} rows, fp32": _authors(many, graphs=False),
        f"authors' MLP, {few} rows, fp32, CUDA graphs": _authors(few, graphs=True),
        f"factors r=4 {sizes.block}x{sizes.block}, {sizes.layer}, {sizes.layer_rows:,} rows, bf16": _factors,
        f"90% zeros {sizes.block}x{sizes.block}, {sizes.layer}, {sizes.packed_rows:,} rows, bf16": _packed,
        f"{sizes.model}, 90% zeros {sizes.block}x{sizes.block}, bf16": _transformer,
        f"decoder, 80% zeros {sizes.decoder.block}x{sizes.decoder.block}, bf16": _decoder,
    }


def run_tests(folder: Path, seconds: float) -> dict[str, Any]:
    """The tests of a folder in a process of its own: how they ended, and the last line that they printed."""
    command = [sys.executable, "-m", "pytest", "-q", "--maxfail=20", str(folder)]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return {"status": None, "said": [f"not done after {seconds:.0f} seconds"]}
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return {"status": done.returncode, "said": [*lines[:20], *done.stdout.splitlines()[-1:]]}


def _before(settings: ShortSettings, head: dict[str, Any], left: Callable[[], float], tell: Tell) -> None:
    """The examination, and the tests that need a GPU."""
    if "check" not in head:
        tell("kronblocks doctor")
        head["check"] = as_json(examine())
    if "tests" not in head and settings.device == "cuda":
        tell(str(TESTS))
        here = f"run in a checkout: there is no {TESTS}"
        seconds = min(_TESTS_SECONDS, left() - _KEPT_SECONDS)
        head["tests"] = run_tests(TESTS, max(1.0, seconds)) if TESTS.is_dir() else {"status": None, "said": [here]}


def run(settings: ShortSettings, clock: Callable[[], float] = time.monotonic) -> Results:
    """Measure what is missing, and write it."""
    end = clock() + 60 * settings.minutes

    def left() -> float:
        return end - clock()

    if settings.tune:
        os.environ["KRONBLOCKS_TUNE"] = "1"
    results = begin(settings, COLUMNS, KEY)
    head = results.head
    for name in ("skipped", "failed", "seconds"):
        head.setdefault(name, {})
    done = {row["part"] for row in results.rows}
    with told() as tell:
        if not settings.tune:
            _before(settings, head, left, tell)
            results.save()
        for name, part in parts(settings.sizes).items():
            if name in done:
                continue
            if left() <= 0:
                head["failed"][name] = f"not begun within {settings.minutes:g} minutes: the same command goes on from here"
                continue
            _measure(name, part, settings, results, tell, clock)
        results.save()
    return results


def _measure(name: str, part: Part, settings: ShortSettings, results: Results, tell: Tell, clock: Callable[[], float]) -> None:
    """One part, written when it is done; what stops it is written too, and the next one begins."""
    head, begun = results.head, clock()
    head["failed"].pop(name, None)
    try:
        rows = part(settings, results, lambda text: tell(f"{name}: {text}"))
    except Exception as error:  # of any kind: the minutes of a GPU are not to be lost to the first mistake
        head["failed"][name] = f"{type(error).__name__}: {error}"[:500]
        rows = []
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    head["seconds"][name] = round(clock() - begun, 1)
    results.add({**row, "part": name} for row in rows)


def summary(results: Results) -> Table:
    """All rows, for the screen."""
    table = Table(title=f"beside dense: {results.path}", title_justify="left")
    for name in ("part", "case", "", "plan", "ms", "speed to dense", "repeats", "peak MiB"):
        table.add_column(name, justify="right" if name in ("ms", "speed to dense", "repeats", "peak MiB") else "left")
    for row in results.rows:
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
        times = [f"{row['ms']:.3g}", f"{row['speed']:.2f}", f"{row['speed_low']:.2f}-{row['speed_high']:.2f}", peak]
        table.add_row(row["part"], row["case"], row["direction"], row["plan"] or "", *times)
    for part, reason in results.head["failed"].items():
        table.add_row(part, f"failed: {reason}")
    return table


def problems(head: Mapping[str, Any]) -> list[str]:
    """What did not work, a line each."""
    found = [f"{part}: {reason}" for part, reason in head["failed"].items()]
    findings = head.get("check", {}).get("findings", [])
    found += [f"{each['about']}: {each['what']}" for each in findings if each["state"] == "fails"]
    tests = head.get("tests", {"status": 0, "said": []})
    return found + ([] if tests["status"] == 0 else [f"tests: {line}" for line in tests["said"]])
