"""What an export gives: the model, and what became of each layer, as a table and as a manifest."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import nn

from kronblocks.core.errors import KronblocksError
from kronblocks.core.files import write_json
from kronblocks.core.tables import between, figureless, rows_of, span, text_table, together
from kronblocks.deploy.packaging import package
from kronblocks.deploy.saving import save_pretrained
from kronblocks.deploy.slimming import Slimmed
from kronblocks.ops.costs.choice import milliseconds

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class ExportedLayer:
    """The form of one block layer in an exported model."""

    name: str
    form: str  # dense, packed, packed-int8, factored or bsr
    out_features: int
    in_features: int
    block_size: str
    density: float
    rows: int  # of the example's x
    bytes: int  # stored
    why: str
    timed: dict[str, float] = field(default_factory=dict)  # seconds by form, at those rows on this machine
    rounding: float | None = None  # of packed-int8: largest difference to the float layer, relative to the largest output

    @property
    def shape(self) -> str:
        """The weight's shape."""
        return f"{self.out_features}x{self.in_features}"


@dataclass(frozen=True)
class Whole:
    """What was timed of whole models, to choose the forms of their layers.

    Args:
        seconds: of a call, or of all phases by their weights. In the end "exported", "dense" (block layers as nn.Linear) and
            "model" (as it was) were timed in turns; the others at first: "layers" (each in its own fastest form), "packed",
            "packed-int8" and "as it was" (the plans of the model).
        timed: number of different wholes.
        complete: False if the budget ended the search before all switches of equal layers were tried.
        weights: of the phases, by name; "" for a single example.
    """

    seconds: dict[str, float]
    timed: int
    complete: bool
    weights: Mapping[str, float]

    def __str__(self) -> str:
        times = {name: milliseconds(self.seconds[name]) for name in ("exported", "model", "dense")}
        rest = "" if self.complete else "; the budget ended the search"
        return (
            f"the whole model: {times['exported']}, as it was {times['model']}, dense {times['dense']}; "
            f"{self.timed} combinations of forms were timed{rest}"
        )


@dataclass(frozen=True)
class Exported:
    """An exported model. Print it for a table.

    With more than 12 layers, like layers share a row, with their mean and least density.
    `print(exported.table(every_layer=True))` has a row for each.

    Args:
        model: a copy in eval mode, without gradients.
        layers: the block layers, in the model's order.
        slimmed: the places where features were removed, so that layers are narrower than the model's.
        remark: why no features could be removed; "" if they could.
        error: largest difference to the model's outputs on the example, relative to the largest output.
        scores: what `evaluate` gave for the model and for the copy; None without it.
        whole: the times of whole models; None if the forms were given, or nothing was to be timed.
        example: the input that it was checked with.
    """

    model: nn.Module
    layers: tuple[ExportedLayer, ...]
    slimmed: tuple[Slimmed, ...]
    remark: str
    error: float
    scores: tuple[float, float] | None = None
    whole: Whole | None = None
    example: Any = field(default=None, repr=False, compare=False)

    def manifest(self) -> dict[str, Any]:
        """The forms of all layers and what was removed, as plain values."""
        layers, slimmed = [asdict(layer) for layer in self.layers], [asdict(each) for each in self.slimmed]
        scores = None if self.scores is None else dict(zip(("model", "exported"), self.scores, strict=True))
        record = {"version": 1, "error": self.error, "layers": layers, "slimmed": slimmed, "remark": self.remark}
        return {**record, "scores": scores, "whole": None if self.whole is None else asdict(self.whole)}

    def save(self, folder: str | Path) -> Path:
        """Write the model (see `save_pretrained`) and manifest.json into a folder.

        Raises:
            KronblocksError: a layer is in torch's BSR form, or the folder cannot be written to.
        """
        sparse = [layer.name for layer in self.layers if layer.form == "bsr"]
        if sparse:
            raise KronblocksError(
                f"{sparse[0]} is in torch's BSR form, which has no file format of its own: export with form='packed', save that, "
                "and call to_torch_bsr() on its layers after loading"
            )
        resized = dict.fromkeys(name for each in self.slimmed for name in (each.producer, each.consumer))
        folder = save_pretrained(self.model, folder, resized=resized)
        try:
            write_json(folder / MANIFEST, self.manifest())
        except OSError as error:
            raise KronblocksError(f"cannot write into {folder}: {error.strerror}") from error
        return folder

    def package(
        self,
        path: str | Path,
        example: Any = None,
        *,
        dynamic_shapes: Any = None,
        tolerance: float | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Path:
        """Compile the model into one .pt2 file, which Python and C++ load without the model's code, and compare what it computes.

        Args:
            path: of the file.
            example: an input; None: the one that `export` got. Its sizes above 1 may change where the model's code allows it.
            dynamic_shapes: which sizes may change, as `torch.export.export` takes it; None: the batch, and sequences of tokens.
            tolerance: how far outputs may differ, relative to the largest; None: 1e-5, or four roundings of a lower precision.
            options: of inductor.

        Raises:
            KronblocksError: torch.export cannot trace the model, there is no C++ compiler, or outputs differ.
        """
        given = self.example if example is None else example
        return package(self.model, path, given, dynamic_shapes=dynamic_shapes, tolerance=tolerance, options=options)

    def __str__(self) -> str:
        return self.table()

    def table(self, *, every_layer: bool = False) -> str:
        """What `print` shows; with `every_layer`, with a row for each layer."""
        layers, hint = rows_of(self.layers, lambda layer: layer.name, _kind, every_layer=every_layer)
        slimmed = [[each] for each in self.slimmed]
        if hint:
            slimmed = together(self.slimmed, lambda each: f"{each.producer} -> {each.consumer}", lambda each: 0, siblings=False)
        lines = [text_table([("layer", "form", "shape", "blocks", "density", "KiB", "why"), *map(_row, layers)])]
        lines += map(_removed, slimmed)
        lines += [self.remark] if self.remark else []
        lines += [] if self.whole is None else [str(self.whole)]
        lines += [f"largest difference to the model: {self.error:.1e} of the largest output"]
        if rounded := [layer.rounding for layer in self.layers if layer.rounding is not None]:
            lines += [f"int8 layers, by rounding: at most {max(rounded):.1e} of a layer's largest output"]
        if self.scores is not None:
            lines += ["evaluated: {:.6g} for the model, {:.6g} for the copy".format(*self.scores)]
        return "\n".join([*lines, *hint])


def _kind(layer: ExportedLayer) -> Hashable:
    """What must be equal for layers to share a row."""
    return layer.form, layer.shape, layer.block_size, figureless(layer.why)


def _row(layers: Sequence[ExportedLayer]) -> Sequence[str]:
    """A row of the table, for one layer or several like layers: their mean and least density, and all their bytes."""
    first, densities = layers[0], [layer.density for layer in layers]
    density, least = f"{fmean(densities):.3f}", f"{min(densities):.3f}"
    return (
        span([layer.name for layer in layers]),
        first.form,
        first.shape,
        first.block_size,
        density if least == density else f"{density}, least {least}",
        f"{sum(layer.bytes for layer in layers) / 1024:,.1f}",
        between([layer.why for layer in layers]),
    )


def _removed(pairs: Sequence[Slimmed]) -> str:
    """A line that says what became narrower."""
    names = span([f"{each.producer} -> {each.consumer}" for each in pairs]).replace(" layers)", " pairs)")
    removed, left = between([str(each.removed) for each in pairs]), between([str(each.left) for each in pairs])
    return f"{names}: {removed} dead features removed, {left} left"
