"""What all benchmarks share, and the options of `kronblocks bench step` and `tables`; the others have theirs beside them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from kronblocks.core.errors import KronblocksError
from kronblocks.ops import backends
from kronblocks_lab.bench.measure.timing import Budget
from kronblocks_lab.training.settings import part_of_a_file_name

RESULTS, QUICK_RESULTS = Path("benchmarks/results"), Path("runs/bench-quick")

Precision = Literal["fp32", "tf32", "bf16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}


def on_gpu(dtype: torch.dtype) -> dict[str, Any]:
    """What times on a GPU depend on beside the settings: the card, and who computes."""
    tuned = os.environ.get("KRONBLOCKS_TUNE") == "1"
    return {"gpu": torch.cuda.get_device_name(), "backend": backends.backend_key("cuda", dtype), "tuned": tuned}


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """What all benchmarks have in common."""

    out: Path | None = None
    """Folder of the results; unset: benchmarks/results, or runs/bench-quick with --quick."""
    quick: bool = False
    """A short form, under two minutes."""
    threads: int = 2
    """Threads that torch uses."""
    fresh: bool = False
    """Measure everything again, instead of what the file does not hold yet."""
    label: str | None = None
    """Added to the file's name, such as AVX2: a second machine's results beside the first one's."""

    kind = ""

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise KronblocksError(f"--threads must be at least 1, not {self.threads}")
        if self.label is not None:
            part_of_a_file_name("--label", self.label)

    @property
    def name(self) -> str:
        """Of the file, without its ending."""
        return "-".join(["bench", self.kind, *self.variant, *([self.label] if self.label else [])])

    @property
    def variant(self) -> list[str]:
        """What else tells files of this benchmark apart."""
        return []

    @property
    def path(self) -> Path:
        """The file of the results."""
        return (self.out or (QUICK_RESULTS if self.quick else RESULTS)) / f"{self.name}.json"


@dataclass(frozen=True, kw_only=True)
class TimedSettings(BenchSettings):
    """What the benchmarks that measure single calls have in common."""

    device: Literal["cpu", "cuda"] = "cpu"
    """On cuda the Triton kernels are used where they agree with float64, unless KRONBLOCKS_TRITON=0."""
    dtype: Precision = "fp32"
    """Of weights and inputs; tf32 is fp32 multiplied on a GPU's tensor cores."""
    compiled: bool = False
    """Also time dense, and the layer as the paper's authors write it, under torch.compile."""
    graphs: bool = False
    """Record every case as a CUDA graph, dense too, so that launches do not count."""
    seconds: float | None = None
    """Of measuring per case and repeat; unset: 0.04, and 0.02 with --quick."""
    repeats: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seconds is not None and not 0 < self.seconds < float("inf"):
            raise KronblocksError(f"--seconds is the time to measure each case in each repeat, above 0, not {self.seconds}")
        if self.repeats < 1:
            raise KronblocksError(f"--repeats must be at least 1, not {self.repeats}")
        if self.device == "cpu":
            for name, asked in (("--dtype tf32", self.dtype == "tf32"), ("--graphs", self.graphs)):
                if asked:
                    raise KronblocksError(f"{name} is for a GPU: add --device cuda, or leave it out")

    @property
    def variant(self) -> list[str]:
        """Each device and precision has its own file."""
        told = {"cuda": self.device == "cuda", self.dtype: self.dtype != "fp32", "graphs": self.graphs}
        return [name for name, is_told in told.items() if is_told]

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of weights and inputs."""
        return DTYPES[self.dtype]

    @property
    def budget(self) -> Budget:
        """How long to measure each case."""
        return Budget(self.seconds or (0.02 if self.quick else 0.04), self.repeats)

    def shared(self) -> dict[str, Any]:
        """What all rows of a file have in common."""
        budget = self.budget
        return {
            "device": self.device,
            "threads": self.threads,
            "dtype": "tf32" if self.dtype == "tf32" else str(self.torch_dtype).removeprefix("torch."),
            "seconds": budget.seconds,
            "repeats": budget.repeats,
            "quick": self.quick,
            **{name: getattr(self, name) for name in ("compiled", "graphs", "label") if getattr(self, name)},
            **(on_gpu(self.torch_dtype) if self.device == "cuda" else {}),
        }


@dataclass(frozen=True, kw_only=True)
class StepSettings(TimedSettings):
    """Time whole training steps of an MLP: forward, cross-entropy, backward, Adam; and their peak memory."""

    rows: tuple[int, ...] | None = None
    """Batch sizes; unset: 256 4096, and 256 with --quick."""
    width: int = 1024
    """Inputs, and size of both hidden layers."""
    cases: tuple[str, ...] | None = None
    """Names of the cases to run, or parts of names; unset: all, and a few with --quick."""
    authors: bool = False
    """The benchmark of the paper's authors: batches of 256 and 20,000, ranks 1, 2, 4 and blocks of 2, 4, 8, all alive."""
    fused: bool = False
    """Adam's fused form for every model."""
    memory: bool = True
    """Also train each model for some steps in a process of its own, for its peak memory and its loss."""
    loss_steps: int | None = None
    """Steps in that process; unset: 20, and 3 with --quick."""

    kind = "step"

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.batches, default=0) < 1:
            raise KronblocksError(f"--rows are batch sizes from 1 on, at least one of them, not {self.rows}")
        if self.width < 64 or self.width % 64:
            raise KronblocksError(f"--width is a multiple of 64, the largest block size, not {self.width}")
        if self.steps < 1:
            raise KronblocksError(f"--loss-steps must be at least 1, not {self.loss_steps}")

    @property
    def batches(self) -> tuple[int, ...]:
        """Batch sizes."""
        return self.rows if self.rows is not None else ((256,) if self.quick else (256, 20_000 if self.authors else 4096))

    @property
    def name(self) -> str:
        """Of the file, without its ending."""
        return super().name.replace(self.kind, f"{self.kind}-authors", 1) if self.authors else super().name

    @property
    def steps(self) -> int:
        """Steps in the process of its own."""
        return self.loss_steps if self.loss_steps is not None else (3 if self.quick else 20)

    def shared(self) -> dict[str, Any]:
        """What all rows of a file have in common."""
        own = {"width": self.width, "fused": self.fused, "loss_steps": self.steps, **({"authors": True} if self.authors else {})}
        return {**super().shared(), **own}


@dataclass(frozen=True, kw_only=True)
class TablesSettings:
    """Write the page of all results, and its figures, from the JSON files."""

    results: Path = RESULTS
    """Folder of the results."""
    page: Path = Path("docs/benchmarks.md")
    """The page; its figures go to the folder figures beside it."""
