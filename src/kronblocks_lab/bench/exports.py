"""`kronblocks bench exports`: models as `export` ships them, against the models they came from, over a grid of 30."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import torch
from rich.table import Table
from torch import Tensor, nn

from kronblocks.config.sparsity import SparsityConfig
from kronblocks.core.errors import KronblocksError
from kronblocks.deploy.exporting import export
from kronblocks.deploy.outputs import call, difference, tensors
from kronblocks.surgery.sparsify import densify_, sparsify_
from kronblocks_lab.bench.deploy import forms_of
from kronblocks_lab.bench.measure.machine import begin, told
from kronblocks_lab.bench.measure.results import Results, Row, significant
from kronblocks_lab.bench.measure.timing import measure
from kronblocks_lab.bench.settings import DTYPES, Precision, TimedSettings

COLUMNS = ("model", "rows", "precision", "case", "forms", "timed", "ms", "ms_low", "ms_high", "speed", "speed_low", "speed_high")
KEY = ("model", "rows", "precision", "case")
MODEL, EXPORTED, DENSE = "as it was", "exported", "dense"
NEVER_BELOW = 0.97
"""Speed of the exported model to the model that it came from, at least."""


class Kind(NamedTuple):
    """A kind of model: how to make it dense, its input for a number of rows, and its blocks."""

    make: Callable[[int], nn.Module]  # from its width
    example: Callable[[int, int], Tensor]  # from rows and width
    width: int
    small: int  # its width with --quick
    block: int = 16
    floats: bool = True  # the input has the model's dtype


def _mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 16, bias=False))


def _convolutions(width: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(16, width, 3, padding=1), nn.ReLU()]
    for _ in range(2):
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 16))


def _vit(width: int) -> nn.Module:
    import transformers as tf

    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 4}
    sizes |= {"num_attention_heads": width // 32}
    images: dict[str, Any] = {"image_size": 32, "patch_size": 8, "num_labels": 16}
    return tf.ViTForImageClassification(tf.ViTConfig(**images, **sizes))


def _decoder(width: int) -> nn.Module:
    import transformers as tf

    heads: dict[str, Any] = {"num_attention_heads": width // 32, "num_key_value_heads": max(1, width // 96)}
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 4, "vocab_size": 512}
    return tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, **heads))


KINDS = {
    "mlp-16x16": Kind(_mlp, torch.randn, 1024, 128),
    "mlp-4x4": Kind(_mlp, torch.randn, 1024, 128, block=4),
    "convolutions": Kind(_convolutions, lambda rows, width: torch.randn(rows, 16, 16, 16), 64, 32),
    "vit": Kind(_vit, lambda rows, width: torch.randn(rows, 3, 32, 32), 192, 64),
    "decoder": Kind(_decoder, lambda rows, width: torch.arange(rows).unsqueeze(0) % 512, 384, 96, floats=False),
}


@dataclass(frozen=True, kw_only=True)
class ExportsSettings(TimedSettings):
    """Time models as `export` ships them against the models they came from: 5 kinds, 3 numbers of rows, 2 precisions."""

    models: tuple[str, ...] = tuple(KINDS)
    """Of: mlp-16x16, mlp-4x4, convolutions, vit, decoder."""
    rows: tuple[int, ...] = (1, 16, 256)
    """Inputs at a time; of the decoder, tokens of one sequence."""
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    sparsity: float = 0.9
    search: float = 15.0
    """Seconds for `export` to time whole models, for each model."""

    kind = "exports"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device != "cpu" or self.dtype != "fp32" or self.compiled:
            raise KronblocksError("bench exports is for a CPU: use --precisions, and leave --device, --dtype and --compiled out")
        if unknown := [name for name in self.models if name not in KINDS]:
            raise KronblocksError(f"--models {unknown[0]!r} is none of {', '.join(KINDS)}")
        if unknown := [name for name in self.precisions if name not in get_args(Precision) or name == "tf32"]:
            raise KronblocksError(f"--precisions are fp32 and bf16 here, not {unknown[0]!r}")
        if min(self.rows, default=0) < 1 or not 0 <= self.sparsity < 1:
            raise KronblocksError("--rows are from 1 on, and --sparsity is a share from 0 to below 1")

    def shared(self) -> dict[str, Any]:
        """What all rows of a file have in common."""
        return {**super().shared(), "sparsity": self.sparsity, "search": self.search}


def sparse_model(name: str, settings: ExportsSettings) -> nn.Module:
    """A model with live blocks at random places, in fp32."""
    kind = KINDS[name]
    torch.manual_seed(0)
    model = kind.make(kind.small if settings.quick else kind.width)
    config = SparsityConfig(
        "static", kind.block, target_sparsity=settings.sparsity, convolutions=name == "convolutions", measure_plans=False
    )
    sparsify_(model, config)
    return model.eval().requires_grad_(False)


def measure_model(settings: ExportsSettings, name: str, rows: int, precision: Precision) -> list[Row]:
    """The model, the exported one and the dense one, timed in turns after their outputs have been compared."""
    kind, dtype = KINDS[name], DTYPES[precision]
    model = sparse_model(name, settings).to(dtype)
    x = kind.example(rows, kind.small if settings.quick else kind.width)
    x = x.to(dtype) if kind.floats else x
    exported = export(model, x, budget=settings.search)
    dense = sparse_model(name, settings).to(dtype)
    densify_(dense)
    error = difference(list(tensors(call(dense, x))), list(tensors(call(model, x))))
    if not error <= (0.1 if precision == "bf16" else 1e-3):
        raise KronblocksError(f"{name}: dense differs by {error:.1e} of the largest output: nothing was timed")
    models = {MODEL: model, EXPORTED: exported.model, DENSE: dense}
    with torch.inference_mode():
        times = measure({case: lambda each=each: each(x) for case, each in models.items()}, settings.budget, seed=rows)
    about = {"model": name, "rows": rows, "precision": precision}
    more = {EXPORTED: {"forms": forms_of(exported), "timed": exported.whole.timed if exported.whole else 0}}
    return [{**about, "case": case, **more.get(case, {}), **times[case].row(times[MODEL])} for case in models]


def worst(results: Results) -> Row | None:
    """The exported model that is slowest against the model that it came from."""
    return min((row for row in results.rows if row["case"] == EXPORTED), key=lambda row: row["speed"], default=None)


def summary(results: Results) -> Table:
    """A row for each model, for the screen."""
    low = worst(results)
    said = "" if low is None else f"; worst {low['speed']:.2f}, where {NEVER_BELOW} is the least allowed"
    table = Table(title=f"exported against the model that it came from: {results.path}{said}", title_justify="left")
    for column in ("model", "rows", "precision", "forms", "ms", "speed", "repeats", "dense's speed"):
        table.add_column(column, justify="left" if column in ("model", "forms") else "right")
    dense = {tuple(row[name] for name in KEY[:3]): row["speed"] for row in results.rows if row["case"] == DENSE}
    for row in results.rows:
        if row["case"] == EXPORTED:
            spread = f"{significant(row['speed_low'], 3)}-{significant(row['speed_high'], 3)}"
            beside = f"{dense[tuple(row[name] for name in KEY[:3])]:.2f}"
            cells = [row["model"], f"{row['rows']:,}", row["precision"], row["forms"], f"{row['ms']:.3f}"]
            table.add_row(*cells, f"{row['speed']:.2f}", spread, beside)
    return table


def run(settings: ExportsSettings) -> Results:
    """Measure what is missing, and write it after each model."""
    results = begin(settings, COLUMNS, KEY)
    with told() as show:
        for precision in settings.precisions:
            for name in settings.models:
                for rows in settings.rows:
                    wanted = {"model": name, "rows": rows, "precision": precision, "case": DENSE}
                    if results.missing([wanted]):
                        show(f"{name}, {rows} rows, {precision}")
                        results.add(measure_model(settings, name, rows, precision))
    return results
