"""Write finished models as ONNX files, and check them in onnxruntime."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from kronblocks.core.checks import number, one_of
from kronblocks.core.errors import KronblocksError
from kronblocks.core.files import replacing
from kronblocks.deploy.exporting import export
from kronblocks.deploy.outputs import arguments, call, difference, tensors
from kronblocks.nn.base import BlockLayer
from kronblocks.nn.kron_linear import KroneckerBlockLinear
from kronblocks.nn.quantized_block_linear import QuantizedBlockLinear
from kronblocks.surgery.replace import replace_

OnnxForm = Literal["dense", "factored"]


class OnnxFile(NamedTuple):
    """A file that was written."""

    path: Path
    error: float  # largest difference to the model's outputs, relative to the largest output


class PlainFactors(nn.Module):
    """The product of a `KroneckerBlockLinear` in two einsums, which every exporter knows; for inference."""

    coeff: Tensor  # (m1, n1, r)
    tiles: Tensor  # (r, bm, bn), or (m1, r, bm, bn)

    def __init__(self, layer: KroneckerBlockLinear) -> None:
        super().__init__()
        self.grid, groups = layer.grid, layer.tile_groups
        self.register_buffer("coeff", layer.effective_coeff().detach().clone())
        tiles = layer.tiles.detach()
        self.register_buffer("tiles", tiles[0] if groups == 1 else tiles.repeat_interleave(layer.grid.shape[0] // groups, 0))
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        blocks = x.unflatten(-1, (self.grid.shape[1], self.grid.block.cols))
        if self.tiles.dim() == 3:  # one bank of tiles: with the tiles first
            y = torch.einsum("pqi,...qia->...pa", self.coeff, torch.einsum("iab,...qb->...qia", self.tiles, blocks))
        else:
            y = torch.einsum("piab,...pib->...pa", self.tiles, torch.einsum("pqi,...qb->...pib", self.coeff, blocks))
        y = y.flatten(-2)
        return y if self.bias is None else y + self.bias


def save_onnx(
    model: nn.Module,
    example: Tensor | tuple[Any, ...] | Mapping[str, Any],
    path: str | Path,
    *,
    form: OnnxForm = "dense",
    dynamic_batch: bool = True,
    tolerance: float = 1e-4,
) -> OnnxFile:
    """Write a finished model as ONNX, without dead features. ONNX has no block-sparse product: layers are dense or factored.

    Args:
        model: trained, or the model of `kronblocks.export`; it stays unchanged.
        example: the model's inputs, all tensors.
        path: of the file.
        form: "dense", or "factored" (two products with Kronecker factors, for layers that have them).
        dynamic_batch: the first dimension of all inputs may have any size.
        tolerance: how far outputs in onnxruntime may differ, relative to the largest.

    Returns:
        The path and the difference.

    Raises:
        KronblocksError: onnx, onnxscript or onnxruntime is not installed; the model cannot be exported; outputs differ; or the
            file cannot be written.
    """
    one_of("form", form, OnnxForm)
    number("tolerance", tolerance, 0, float("inf"), "a share of the largest output, from 0 on")
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise KronblocksError(f"ONNX needs {', '.join(missing)}: pip install {' '.join(missing)}")
    if any(isinstance(module, QuantizedBlockLinear) for module in model.modules()):
        raise KronblocksError("ONNX has no product for int8 blocks: give the model that it was exported from, with float values")
    plain = _plain(model, example, form)
    args, kwargs = arguments(example)
    inputs = [*args, *kwargs.values()]
    if not all(isinstance(each, Tensor) for each in inputs):
        raise KronblocksError("an ONNX model's inputs are tensors: give an example of tensors, positional or by name")
    batch: Any = {0: torch.export.Dim("batch", min=1)} if dynamic_batch else None
    shapes: Any = (*[batch] * len(args),) if args else dict.fromkeys(kwargs, batch)
    try:
        with _quiet():
            program = torch.onnx.export(plain, args, kwargs=dict(kwargs), dynamo=True, dynamic_shapes=shapes, verbose=False)
    except Exception as error:  # tracing and translating may raise anything
        raise KronblocksError(f"torch.onnx cannot export this model: {error}") from error
    assert program is not None
    path = Path(path)
    try:
        with replacing(path) as temporary:
            program.save(str(temporary))
            wanted = list(tensors(call(plain, example)))
            error = difference([torch.from_numpy(each) for each in _run(temporary, inputs)][: len(wanted)], wanted)
            if not error <= tolerance:
                raise KronblocksError(
                    f"in onnxruntime outputs differ by {error:.1e} of the largest, more than tolerance={tolerance:g}"
                )
    except OSError as error:
        raise KronblocksError(f"cannot write {path}: {error}") from error
    return OnnxFile(path, error)


def _plain(model: nn.Module, example: Any, form: OnnxForm) -> nn.Module:
    """A copy of the model with ordinary modules only."""
    if not _has_blocks(model):
        return copy.deepcopy(model).eval().requires_grad_(False)
    if form == "dense":
        return export(model, example, form="dense").model
    new = export(model, example, form="factored").model
    for name, layer in list(new.named_modules()):
        if isinstance(layer, KroneckerBlockLinear):
            replace_(new, name, PlainFactors(layer))
    return export(new, example, form="dense", slim=False).model if _has_blocks(new) else new  # layers of free values


def _has_blocks(model: nn.Module) -> bool:
    return any(isinstance(module, BlockLayer) for module in model.modules())


def _run(path: Path, inputs: list[Any]) -> list[Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    return list(session.run(None, {name: each.detach().cpu().numpy() for name, each in zip(names, inputs, strict=True)}))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's progress and its remarks on versions."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
