"""Options of `kronblocks bench step`, `train` and `tables`, and what all benchmarks share; the grids have `grids.py`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from kronblocks.config.methods import METHODS, Method
from kronblocks.config.sparsity import SparsityConfig
from kronblocks.core.errors import KronblocksError
from kronblocks.ops import backends
from kronblocks_lab.bench.measure.timing import Budget
from kronblocks_lab.training.models import TransformerName
from kronblocks_lab.training.settings import DataName, TrainConfig, part_of_a_file_name

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

    kind = ""

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise KronblocksError(f"--threads must be at least 1, not {self.threads}")

    @property
    def name(self) -> str:
        """Of the file, without its ending."""
        return f"bench-{self.kind}"

    @property
    def path(self) -> Path:
        """The file of the results."""
        return (self.out or (QUICK_RESULTS if self.quick else RESULTS)) / f"{self.name}.json"


@dataclass(frozen=True, kw_only=True)
class TimedSettings(BenchSettings):
    """What the benchmarks that measure single calls have in common."""

    device: Literal["cpu", "cuda"] = "cpu"
    """On cuda the Triton kernels are used where Triton is installed, unless KRONBLOCKS_TRITON=0."""
    dtype: Precision = "fp32"
    """Of weights and inputs; tf32 is fp32 multiplied on a GPU's tensor cores."""
    compiled: bool = False
    """Also time dense, and the layer as the paper's authors write it, under torch.compile."""
    graphs: bool = False
    """Record every case as a CUDA graph, dense too, so that launches do not count."""
    seconds: float | None = None
    """Of measuring per case and repeat; unset: 0.04, and 0.02 with --quick."""
    repeats: int = 3
    label: str | None = None
    """Added to the file's name, such as AVX2: a second machine's results beside the first one's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label is not None:
            part_of_a_file_name("--label", self.label)
        if self.seconds is not None and not 0 < self.seconds < float("inf"):
            raise KronblocksError(f"--seconds is the time to measure each case in each repeat, above 0, not {self.seconds}")
        if self.repeats < 1:
            raise KronblocksError(f"--repeats must be at least 1, not {self.repeats}")
        if self.device == "cpu":
            for name, asked in (("--dtype tf32", self.dtype == "tf32"), ("--graphs", self.graphs)):
                if asked:
                    raise KronblocksError(f"{name} is for a GPU: add --device cuda, or leave it out")

    @property
    def name(self) -> str:
        """Of the file, without its ending: each device and precision has its own."""
        parts = [super().name, *(["cuda"] if self.device == "cuda" else []), *([self.dtype] if self.dtype != "fp32" else [])]
        return "-".join([*parts, *(["graphs"] if self.graphs else []), *([self.label] if self.label else [])])

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
class DeploySettings(TimedSettings):
    """Time a whole MLP as `export` ships it, beside the dense one and PyTorch's int8 form of that."""

    rows: tuple[int, ...] | None = None
    """Batch sizes; unset: 1 16 256 2048, and 256 with --quick."""
    width: int = 1024
    """Inputs, and size of the hidden layers."""
    layers: int = 3
    """Block-sparse layers; a dense one of 10 outputs follows."""
    blocks: tuple[int, ...] = (4, 16, 64)
    """Block sizes."""
    sparsity: float = 0.9

    kind = "deploy"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device != "cpu" or self.dtype != "fp32" or self.compiled:
            raise KronblocksError("bench deploy measures on a CPU in fp32: leave --device, --dtype and --compiled out")
        if min(self.batches, default=0) < 1 or self.layers < 1:
            raise KronblocksError("--rows and --layers are numbers from 1 on")
        if min(self.blocks, default=0) < 1 or any(self.width % block for block in self.blocks):
            raise KronblocksError(f"--blocks {self.blocks} must divide --width {self.width}")
        if not 0 <= self.sparsity < 1:
            raise KronblocksError(f"--sparsity is a share from 0 to below 1, not {self.sparsity}")

    @property
    def batches(self) -> tuple[int, ...]:
        """Batch sizes."""
        return self.rows if self.rows is not None else ((256,) if self.quick else (1, 16, 256, 2048))

    def shared(self) -> dict[str, Any]:
        """What all rows of a file have in common."""
        own = {"width": self.width, "layers": self.layers, "blocks": list(self.blocks), "sparsity": self.sparsity}
        return {**super().shared(), **own}


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


@dataclass(frozen=True, kw_only=True)
class TrainSettings(BenchSettings):
    """Whole trainings on the clock: dense and sparse methods, the same epochs, in turns, each in a process of its own."""

    data: DataName | None = None
    """Data set; unset: Fashion-MNIST where it is installed, else 5,000 digits of MNIST, which are also what --quick takes."""
    widths: tuple[int, ...] = (1024, 1024)
    """Hidden sizes of the MLP."""
    block_size: str = "16"
    sparsity: float = 0.9
    epochs: int | None = None
    """Unset: 8, and 3 with --quick."""
    batch_size: int = 256
    seeds: tuple[int, ...] | None = None
    """Unset: 0 1 2, and 0 with --quick."""
    methods: tuple[Method, ...] | None = None
    """Beside dense; unset: all, and two-phase with --quick."""
    work: Path | None = None
    """Folder of the trainings, where finished ones are taken from unless --fresh; unset: runs/bench-train, and
    runs/bench-quick/train with --quick."""

    kind = "train"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.all_seeds:
            raise KronblocksError("--seeds without a value leaves nothing to train: give at least one")
        self.trainings("mnist5k")

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """Each gives one training of each method."""
        return self.seeds if self.seeds is not None else ((0,) if self.quick else (0, 1, 2))

    @property
    def all_methods(self) -> tuple[Method, ...]:
        """In the order of the first seed."""
        unset: tuple[Method, ...] = ("two-phase",) if self.quick else tuple(METHODS)
        return tuple(dict.fromkeys(("dense", *(unset if self.methods is None else self.methods))))

    def trainings(self, data: DataName) -> list[TrainConfig]:
        """What to train, in order: the methods take turns, and the one that begins alternates.

        Raises:
            KronblocksError: a setting that a training cannot have.
        """
        work = self.work or (QUICK_RESULTS / "train" if self.quick else Path("runs/bench-train"))
        epochs = self.epochs if self.epochs is not None else (3 if self.quick else 8)
        trainings = []
        for number, seed in enumerate(dict.fromkeys(self.all_seeds)):
            for method in self.all_methods if number % 2 == 0 else reversed(self.all_methods):
                trainings.append(
                    TrainConfig(
                        out=work / f"{data}-{method}-s{seed}",
                        data=data,
                        widths=self.widths,
                        method=method,
                        block_size=self.block_size,
                        sparsity=self.sparsity,
                        epochs=epochs,
                        batch_size=self.batch_size,
                        seed=seed,
                        threads=self.threads,
                        resume=True,
                        progress=False,
                    )
                )
        return trainings

    def shared(self, data: DataName) -> dict[str, Any]:
        """What all rows of a file have in common."""
        config = self.trainings(data)[0].settings()
        names = ("data", "widths", "block_size", "sparsity", "epochs", "batch_size", "threads")
        return {**{name: config[name] for name in names}, "quick": self.quick}


@dataclass(frozen=True, kw_only=True)
class TablesSettings:
    """Write the page of all results, and its figures, from the JSON files."""

    results: Path = RESULTS
    """Folder of the results."""
    page: Path = Path("docs/benchmarks.md")
    """The page; its figures go to the folder figures beside it."""
