"""One file that computes a model without its code: torch.export and AOTInductor, with the operators of src/native."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kronblocks.core.errors import KronblocksError
from kronblocks.deploy.outputs import arguments, call, difference, prepared, tensors

TOLERANCE = 1e-5


def package(
    model: nn.Module,
    path: str | Path,
    example: Any,
    *,
    dynamic_shapes: Any = None,
    tolerance: float | None = None,
    options: Mapping[str, Any] | None = None,
) -> Path:
    """Compile a finished model into a .pt2 file, and compare what it computes.

    Python loads it by `torch._inductor.aoti_load_package(path)` after `import kronblocks`, and C++ as `examples/cpp` does.
    Neither needs the model's code.

    Args:
        model: in eval mode, such as `Exported.model`.
        path: of the file; its name ends with .pt2.
        example: the model's input, as for `export`. Sizes of 1 stay 1: give two inputs or more.
        dynamic_shapes: which sizes may change, as `torch.export.export` takes it. None: the first of every tensor, and the second
            of tensors of whole numbers, which is the length of a sequence, where the model's code allows it.
        tolerance: how far outputs may differ, relative to the largest; None: 1e-5, or four roundings of a lower precision.
        options: of inductor, for `torch._inductor.aoti_compile_and_package`.

    Returns:
        The path.

    Raises:
        KronblocksError: torch.export cannot trace the model, no compiler is there, or outputs differ.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise KronblocksError(f"a package's name ends with .pt2, not {path.name!r}: write {path.stem}.pt2")
    if example is None or callable(example):
        raise KronblocksError("package needs an input of the model, not a function: package(path, example=...)")
    args, kwargs = arguments(prepared(example))
    shapes = _dynamic(args, kwargs) if dynamic_shapes is None else dynamic_shapes
    try:
        with torch.no_grad():
            program = torch.export.export(model, args, dict(kwargs), dynamic_shapes=shapes)
    except Exception as error:  # the model's code may do anything
        raise KronblocksError(
            f"torch.export cannot trace the model: {type(error).__name__}: {_first(error)}. Let forward decide nothing by the "
            "numbers in tensors, return tensors only (for transformers models: use_cache=False, return_dict=False), or package "
            "the part of the model that computes"
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / path.name
        try:
            torch._inductor.aoti_compile_and_package(program, package_path=str(made), inductor_configs=dict(options or {}))
            loaded = torch._inductor.aoti_load_package(str(made))
        except Exception as error:
            raise KronblocksError(
                f"AOTInductor cannot compile the model: {_first(error)}. It needs a C++ compiler, such as g++"
            ) from error
        expected = list(tensors(call(model, example)))
        with torch.no_grad():
            found = list(tensors(loaded(*args, **kwargs)))
        error = difference(found, expected)
        dtypes = {tensor.dtype for tensor in expected}
        allowed = max([TOLERANCE, *(4 * torch.finfo(d).eps for d in dtypes)]) if tolerance is None else tolerance
        if not error <= allowed:
            raise KronblocksError(
                f"the package's outputs differ by {error:.1e} of the largest output, more than tolerance={allowed:.2g}: please "
                "report this, or write a larger tolerance= if the model's precision explains it"
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(made.read_bytes())
        except OSError as error:
            raise KronblocksError(f"cannot write {path}: {error.strerror}") from error
    return path


def _dynamic(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Sizes that may change, where torch.export finds that they can."""

    def sizes(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        most = 1 if value.is_floating_point() else 2
        return {dim: torch.export.Dim.AUTO for dim in range(min(most, value.dim())) if value.shape[dim] > 1}

    if kwargs:
        return {name: sizes(value) for name, value in kwargs.items()}
    return tuple(sizes(value) for value in args)


def _first(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
