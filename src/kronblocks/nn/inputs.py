"""Inputs other than ordinary dense tensors, as nn.Linear accepts them."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, fx, nn

from kronblocks.core.errors import PerformanceWarning
from kronblocks.ops.operands import check_tensor


def map_unusual(layer: nn.Module, x: Any) -> Tensor:
    """Apply a layer to a nested or sparse tensor, or to a proxy of torch.fx.

    Args:
        layer: is called with ordinary tensors.
        x: nested (jagged or strided), sparse (any layout), or a proxy, for which the layer becomes one node.

    Raises:
        KronblocksError: x is not a tensor.
    """
    if isinstance(x, fx.Proxy):
        return x.tracer.create_proxy("call_module", x.tracer.path_of_module(layer), (x,), {})  # pyright: ignore
    check_tensor(x)
    if x.is_nested and x.layout is torch.jagged:
        where = {"jagged_dim": x._ragged_idx, "min_seqlen": x._maybe_min_seqlen, "max_seqlen": x._maybe_max_seqlen}
        return torch.nested.nested_tensor_from_jagged(layer(x.values()), x.offsets(), x.lengths(), **where)
    if x.is_nested:
        return torch.nested.as_nested_tensor([layer(each) for each in x.unbind()])
    warnings.warn("a sparse input is made dense before a block layer multiplies", PerformanceWarning, stacklevel=3)
    return layer(x.to_dense())
