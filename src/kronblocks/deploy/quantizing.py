"""Whether layers with int8 values compute what they should: no further from the float layer than rounding explains."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kronblocks.core.errors import KronblocksError
from kronblocks.core.hooks import forward_input
from kronblocks.nn.block_sparse_linear import BlockSparseLinear
from kronblocks.nn.quantized_block_linear import QuantizedBlockLinear
from kronblocks.ops.packed import packed_linear
from kronblocks.ops.packed_int8 import LARGEST

ROOM = 2.0
"""A model's relative error may be so many times the sum of its layers' own. Trained models had 0.25 to 0.65 of it (measured)."""


@contextlib.contextmanager
def checked_rounding(model: nn.Module, floats: Mapping[str, BlockSparseLinear]) -> Iterator[dict[str, float]]:
    """Compare each call of an int8 layer with its float layer on the same input, while the context is open.

    Args:
        model: has the int8 layers.
        floats: the layers that they were made from, by name.

    Yields:
        For each layer its largest difference, relative to its largest output; 0 until it is called.

    Raises:
        KronblocksError: an output differs by more than the rounding of values and inputs explains (equation 28).
    """
    errors = dict.fromkeys(floats, 0.0)

    def watch(name: str, layer: BlockSparseLinear) -> Callable[..., None]:
        def compare(module: Any, args: Any, kwargs: Any, y: Tensor) -> None:
            x = forward_input(args, kwargs)
            if x.layout is torch.strided and not x.is_nested and x.numel():
                errors[name] = max(errors[name], _relative_error(name, module, layer, x, y))

        return compare

    with contextlib.ExitStack() as hooks:
        for name, layer in floats.items():
            module = model.get_submodule(name)
            hooks.callback(module.register_forward_hook(watch(name, layer), with_kwargs=True).remove)
        yield errors


@torch.no_grad()
def _relative_error(name: str, quantized: QuantizedBlockLinear, layer: BlockSparseLinear, x: Tensor, y: Tensor) -> float:
    x, index, values = x.reshape(-1, x.shape[-1]).float(), _index(layer), layer.values.float()
    bias = None if layer.bias is None else layer.bias.float()
    exact = packed_linear(x, values, index, bias)
    factors, scales, size = x.abs().amax(-1, keepdim=True) / LARGEST, quantized.scales, values.abs()
    ones = torch.ones_like(size)
    weights = packed_linear(torch.ones_like(x[:1]), size, index)  # sums of |W| over each row
    live = packed_linear(torch.ones_like(x[:1]), ones, index)
    rounding = factors / 2 * weights + scales / 2 * packed_linear(x.abs(), ones, index) + factors * scales / 4 * live
    products = packed_linear(x.abs(), size, index) + (0 if bias is None else bias.abs())
    unit = torch.finfo(y.dtype).eps + x.shape[1] * torch.finfo(torch.float32).eps  # y is rounded, and so is a sum in float32
    gap = (y.reshape(exact.shape).float() - exact).abs()
    if not bool((gap <= rounding + 2 * unit * products).logical_or(~exact.isfinite()).all()):
        raise KronblocksError(
            f"{name} with int8 values differs from the float layer by more than rounding explains: please report this, and "
            "export with precision='same' meanwhile"
        )
    largest = exact.nan_to_num(0, 0, 0).abs().max()
    return float(gap.nan_to_num(0, 0, 0).max() / largest) if largest > 0 else 0.0


def _index(layer: BlockSparseLinear) -> Any:
    return layer._follow().index
