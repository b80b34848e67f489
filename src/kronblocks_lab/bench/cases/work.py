"""The least work of a model's step (floating-point operations of products, bytes that must move), and the machine's speed at it,
by products and copies measured in the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kronblocks.nn.base import BlockLayer
from kronblocks_lab.bench.cases.peers import AuthorsLayer
from kronblocks_lab.bench.measure.machine import copy_rate
from kronblocks_lab.bench.measure.results import Row, significant

_PASSES = 10  # over the parameters of a step with Adam: read twice, gradient written, four things read and three written


class Work(NamedTuple):
    """The work of one step or call."""

    flops: int
    moved: int  # bytes

    def bounds(self, ms: float, dense_ms: float, machine: Mapping[str, Any]) -> Row:
        """For a time: its GFLOP/s, and the ratios to dense that the machine's products and copies allow."""
        product = self.flops / (1e6 * machine["product_gflops"])
        copies = 1e3 * self.moved / copy_rate(machine, self.moved)
        return {
            "gflops": significant(self.flops / ms / 1e6),
            "macs_bound": significant(dense_ms / product),
            "bytes_bound": significant(dense_ms / copies),
        }


def count_work(model: nn.Module, run: Callable[[], object], itemsize: int, *, training: bool) -> Work:
    """Run a step, and count its operations (by torch's counter) and bytes.

    Each input and output of a linear layer, and in training each of their gradients, counts once. Parameters count as often as
    they are needed.

    Args:
        model: the model with the layers.
        run: a forward, or a forward and backward.
        itemsize: bytes of an input's value.
        training: whether `run` is a training step without the optimiser's.
    """
    ends = 0

    def look(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal ends
        ends += inputs[0].numel() + output.numel()

    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, BlockLayer, AuthorsLayer))]
    hooks = [layer.register_forward_hook(look) for layer in layers]
    with FlopCounterMode(display=False) as counter:
        run()
    for hook in hooks:
        hook.remove()
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    return Work(counter.get_total_flops(), ends * itemsize * (2 if training else 1) + parameters * (_PASSES if training else 1))
