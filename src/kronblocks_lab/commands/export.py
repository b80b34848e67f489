"""`kronblocks export`: write the model of a finished training for inference."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from kronblocks.core.errors import KronblocksError
from kronblocks.deploy.exported import Exported
from kronblocks.deploy.exporting import Form, Precision, export
from kronblocks.deploy.judging import BUDGET
from kronblocks.integrations.onnx import save_onnx
from kronblocks_lab.bench.measure.machine import told
from kronblocks_lab.training.threads import ThreadSettings
from kronblocks_lab.training.trained import trained_model, validation_score


@dataclass(frozen=True, kw_only=True)
class ExportConfig(ThreadSettings):
    """Settings of `kronblocks export`."""

    run: tyro.conf.Positional[Path]
    """Folder of `kronblocks train`."""
    out: Path
    """Folder for the exported model and its manifest.json."""
    form: Form = "auto"
    """The form of the layers: the fastest for each (auto), or one for all."""
    precision: Precision = "same"
    """int8: --form auto may choose int8 values, which change outputs a little."""
    evaluate: bool = False
    """Also compute the accuracy on the validation images, of the trained model and of the exported one; of text the loss."""
    data_dir: Path | None = None
    """For --evaluate: folder with the data set's original files."""
    data_file: Path | None = None
    """For --evaluate: the text; unset: the source of Python's standard library."""
    onnx: Path | None = None
    """Also write this ONNX file, with dense layers, checked in onnxruntime."""
    rows: int = 256
    """Number of images, or of characters, in the batch with which forms are timed."""
    budget: float = BUDGET
    """Seconds for timing whole models; 0: each layer gets the form that is fastest alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("data_dir", "data_file"):
            if getattr(self, name) is not None and not self.evaluate:
                raise KronblocksError(f"--{name.replace('_', '-')} is for --evaluate: add that")
        if self.rows < 1:
            raise KronblocksError(f"--rows must be at least 1, not {self.rows}")


def main(config: Annotated[ExportConfig, tyro.conf.arg(name="")]) -> Exported:
    """Write a finished training's model in the form that runs fastest here, and check it against the trained one."""
    config.use_threads()
    trained = trained_model(config.run)
    model, example = trained.model, trained.example(config.rows)
    evaluate = validation_score(config.run, config.data_dir, config.data_file) if config.evaluate else None
    console = Console(soft_wrap=True, highlight=False)
    with told() as show:
        exported = export(
            model,
            example,
            form=config.form,
            precision=config.precision,
            evaluate=evaluate,
            budget=config.budget,
            progress=lambda what: show(f"timing: {what}"),
        )
    console.print(str(exported), markup=False)
    console.print(f"exported: {exported.save(config.out).resolve()}")
    if config.onnx is not None:
        made = save_onnx(model, example, config.onnx)
        console.print(f"onnx: {made.path.resolve()}, largest difference {made.error:.1e} of the largest output")
    return exported
