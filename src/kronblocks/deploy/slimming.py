"""Remove dead features between two layers: those that are constant, and those that the next layer does not read."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from kronblocks.nn.base import BlockLayer
from kronblocks.nn.block_sparse_linear import BlockSparseLinear
from kronblocks.nn.kron_linear import KroneckerBlockLinear
from kronblocks.surgery.replace import replace_
from kronblocks.surgery.sparsify import densify_

_aten = torch.ops.aten
_LINEAR = _aten.linear.default
_ELEMENTWISE = {  # functions of single features, whose other arguments are not tensors
    _aten.relu.default, _aten.gelu.default, _aten.silu.default, _aten.tanh.default, _aten.sigmoid.default,
    _aten.leaky_relu.default, _aten.elu.default, _aten.hardswish.default, _aten.hardtanh.default, _aten.relu6.default,
    _aten.hardsigmoid.default, _aten.softplus.default, _aten.mish.default, _aten.clone.default, _aten.dropout.default,
}  # fmt: skip


@dataclass(frozen=True)
class Slimmed:
    """How many features were removed between two layers."""

    producer: str  # the layer that had them as outputs
    consumer: str
    removed: int
    left: int


class _Pair(NamedTuple):
    """A layer, the next one, and the functions of single features between them."""

    producer: str
    consumer: str
    between: tuple[fx.Node, ...]


def remove_dead_features_(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[Slimmed], str]:
    """Remove constant or unread features between layers, in place.

    The first layer's output must reach the second one only, through functions of single features (ReLU, GELU, ...). A
    constant feature moves into the next layer's bias. Block layers lose whole block rows and columns.

    Args:
        model: in eval mode.
        args: positional arguments for a call.
        kwargs: keyword arguments for the call.

    Returns:
        What was removed, and why nothing could be removed ("" if it could).
    """
    plain = copy.deepcopy(model)
    densify_(plain)
    try:
        program = torch.export.export(plain, args, dict(kwargs))
    except Exception as error:  # tracing may raise anything: then the model stays as it is
        return [], f"the model cannot be traced by torch.export ({type(error).__name__}), so no features were removed"
    pairs = list(_pairs(program))
    removed: dict[tuple[str, str], int] = {}
    changed = True
    while changed:  # after a layer gets narrower, features of the one before it may be unread
        changed = False
        for pair in reversed(pairs):
            count = _narrow_(model, pair)
            removed[pair.producer, pair.consumer] = removed.get((pair.producer, pair.consumer), 0) + count
            changed |= count > 0
    found = [Slimmed(*names, count, _layer(model, names[0]).out_features) for names, count in removed.items() if count]
    return found, ""


def _pairs(program: torch.export.ExportedProgram) -> Iterator[_Pair]:
    names = program.graph_signature.inputs_to_parameters

    def layer(node: fx.Node) -> str | None:
        """The name of the layer of a linear node, if no other node is of that layer."""
        weight = node.args[1]
        assert isinstance(weight, fx.Node)
        name = names.get(weight.name, "")
        return name.removesuffix(".weight") if name.endswith(".weight") and len(weight.users) == 1 else None

    for node in program.graph.nodes:
        if node.target is not _LINEAR or (producer := layer(node)) is None:
            continue
        between: list[fx.Node] = []
        here = node
        while len(here.users) == 1:
            (after,) = here.users
            if after.args[:1] != (here,):
                break
            if after.target is _LINEAR:
                if (consumer := layer(after)) is not None:
                    yield _Pair(producer, consumer, tuple(between))
                break
            if after.target not in _ELEMENTWISE:
                break
            between.append(after)
            here = after


def _layer(model: nn.Module, name: str) -> Any:
    return model.get_submodule(name)


def _block(layer: nn.Module) -> tuple[int, int]:
    """How many output and input features must be removed together."""
    if not isinstance(layer, BlockLayer):
        return 1, 1
    return layer.grid.block.rows, layer.grid.block.cols


@torch.no_grad()
def _narrow_(model: nn.Module, pair: _Pair) -> int:
    """Remove features between two layers; returns their number."""
    producer, consumer = _layer(model, pair.producer), _layer(model, pair.consumer)
    linear = (nn.Linear, BlockLayer)
    if not isinstance(producer, linear) or not isinstance(consumer, linear) or producer.out_features != consumer.in_features:
        return 0
    if isinstance(producer, KroneckerBlockLinear) and producer.tile_groups not in (1, producer.grid.shape[0]):
        return 0
    constant = (producer.weight == 0).all(1)
    dead = constant | (consumer.weight == 0).all(0)
    unit = math.lcm(_block(producer)[0], _block(consumer)[1])
    gone = dead.view(-1, unit).all(1)
    if gone.all():
        gone[0] = False  # a layer keeps at least one feature
    gone = gone.repeat_interleave(unit)
    if not gone.any():
        return 0
    offset = _constant_output(producer, consumer, gone & constant, pair.between)
    replace_(model, pair.producer, _with_features(producer, ~gone, 0))
    new = _with_features(consumer, ~gone, 1)
    if offset is not None:
        new.bias = nn.Parameter(offset if new.bias is None else new.bias + offset, requires_grad=False)
    replace_(model, pair.consumer, new)
    return int(gone.sum())


def _constant_output(producer: Any, consumer: Any, where: Tensor, between: tuple[fx.Node, ...]) -> Tensor | None:
    """The consumer's output from the constant features, (out_features,)."""
    value = producer.weight.new_zeros(producer.out_features) if producer.bias is None else producer.bias
    for node in between:
        value = node.target(value, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    offset = consumer.weight[:, where] @ value[where]
    return offset if bool((offset != 0).any()) else None


def _with_features(layer: Any, keep: Tensor, side: int) -> Any:
    """A layer with some of its output (side 0) or input (side 1) features only."""
    bias = None if layer.bias is None else layer.bias[keep] if side == 0 else layer.bias
    if isinstance(layer, KroneckerBlockLinear):
        return _narrow_factors(layer, keep, side, bias)
    weight = layer.weight[keep] if side == 0 else layer.weight[:, keep]
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    linear.eval()
    if isinstance(layer, BlockSparseLinear):
        mask = layer.block_mask.index_select(side, _kept_blocks(layer, keep, side))
        return BlockSparseLinear.from_dense(linear, block_size=layer.grid.block, mask=mask, plan=layer.plan).requires_grad_(False)
    return linear


def _kept_blocks(layer: BlockLayer, keep: Tensor, side: int) -> Tensor:
    return keep.view(-1, _block(layer)[side])[:, 0].nonzero().squeeze(1)


def _narrow_factors(layer: KroneckerBlockLinear, keep: Tensor, side: int, bias: Tensor | None) -> KroneckerBlockLinear:
    blocks = _kept_blocks(layer, keep, side)
    own_tiles = side == 0 and layer.tile_groups > 1  # banks go with their block rows
    features = [layer.out_features, layer.in_features]
    features[side] = int(keep.sum())
    new = KroneckerBlockLinear(
        features[1],
        features[0],
        layer.grid.block,
        layer.coeff.shape[2],
        tile_groups=len(blocks) if own_tiles else layer.tile_groups,
        gate=layer.gate is not None,
        bias=bias is not None,
        plan=layer.plan,
        device="meta",  # draws no random numbers
        dtype=layer.coeff.dtype,
    ).to_empty(device=layer.coeff.device)
    new.requires_grad_(False)
    new.block_mask.fill_(True)
    new.coeff.copy_(layer.coeff.index_select(side, blocks))
    new.tiles.copy_(layer.tiles[blocks] if own_tiles else layer.tiles)
    if new.gate is not None and layer.gate is not None:
        new.gate.copy_(layer.gate.index_select(side, blocks))
    if new.bias is not None and bias is not None:
        new.bias.copy_(bias)
    new.set_block_mask_(layer.block_mask.index_select(side, blocks))
    new.choose_plan_()
    return new.eval()
