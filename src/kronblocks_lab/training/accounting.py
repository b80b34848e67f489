"""Counted costs of a training: multiply-adds of every step, exact bytes, and the peak memory of this process."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import re
import resource
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from kronblocks.core.hooks import forward_input
from kronblocks.nn.base import BlockLayer
from kronblocks.ops.costs.counts import cost
from kronblocks.surgery.replace import evaluating


class MacCounter:
    """Counts the multiply-adds of one step of a model, by the present plan and density of each layer.

    It counts the products of linear, convolution and block layers, and those of activations in attention: all of them, also
    where a causal mask hides half. As usual, activation functions and optimiser arithmetic do not count. A layer whose input
    needs no gradient computes none.

    Args:
        model: the model.
        example: (N, ...) a batch, to count the rows that reach each layer.
    """

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        self._model = model
        self._seen: dict[str, tuple[float, bool]] = {}  # rows per sample, and whether the input needs a gradient
        counter = FlopCounterMode(display=False)  # two operations a multiply-add
        before = within = 0

        def enter(*_: Any) -> None:
            nonlocal before
            before = counter.get_total_flops()

        def watch(name: str) -> Any:
            def leave(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
                nonlocal within
                within += counter.get_total_flops() - before
                rows = output.numel() / (output.shape[1] if isinstance(module, nn.Conv2d) else output.shape[-1])
                self._seen[name] = (rows / len(example), forward_input(args, kwargs).requires_grad)

            return leave

        handles = []
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d | BlockLayer):
                handles.append(module.register_forward_pre_hook(enter))
                handles.append(module.register_forward_hook(watch(name), with_kwargs=True))
        attention = sdpa_kernel(SDPBackend.MATH)  # as the products that it consists of
        with evaluating(model), torch.enable_grad(), attention, counter:
            model(example)
        for handle in handles:
            handle.remove()
        self._outside = (counter.get_total_flops() - within) / 2 / len(example)  # multiply-adds per sample outside the layers

    @property
    def attention_macs(self) -> int:
        """Forward multiply-adds of a sample outside the layers: products of activations."""
        return round(self._outside)

    def _layer(self, name: str, samples: int, training: bool) -> int:
        module = self._model.get_submodule(name)
        rows_per_sample, input_grad = self._seen[name]
        rows = round(samples * rows_per_sample)
        if isinstance(module, BlockLayer):
            problem = module.problem(rows=rows, training=training, input_grad=input_grad)
            return cost(problem, module.active_plan).macs
        weight = module.weight
        assert isinstance(weight, Tensor)
        return rows * weight.numel() * ((2 + input_grad) if training else 1)

    def training_macs(self, samples: int) -> int:
        """Forward and backward multiply-adds of a batch of this many samples, now."""
        outside = 3 * round(samples * self._outside)  # such a product has the gradients of two activations
        return outside + sum(self._layer(name, samples, True) for name in self._seen)

    def growth_macs(self, samples: int, weights: Mapping[str, int]) -> int:
        """Multiply-adds of the dense gradients of some layers' weights, which score dead blocks before some mask updates.

        Args:
            samples: in the batch.
            weights: layers' names, and how many weights each would have dense.
        """
        return sum(round(samples * self._seen[name][0]) * number for name, number in weights.items())

    def inference_macs(self, samples: int = 1, live: Mapping[str, float] | None = None) -> int:
        """Forward multiply-adds of a batch of this many samples, now.

        Args:
            samples: in the batch.
            live: shares of the blocks that live, of layers by name: their zero blocks are left out, as export can, where that is
                less than what the layer's plan takes.
        """
        total = round(samples * self._outside)
        for name in self._seen:
            own = self._layer(name, samples, False)
            if live is not None and name in live:
                module, rows = self._model.get_submodule(name), round(samples * self._seen[name][0])
                assert isinstance(module, nn.Linear | BlockLayer)
                own = min(own, round(rows * module.in_features * module.out_features * live[name]))
            total += own
        return total


def tensor_bytes(tensors: Iterator[Tensor]) -> int:
    """Bytes of tensors, each object once."""
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


def training_bytes(model: nn.Module, optimizer: Optimizer) -> dict[str, int]:
    """Exact bytes that a training holds between steps."""
    gradients = (p.grad for p in model.parameters() if p.grad is not None)
    return {
        "parameters": tensor_bytes(model.parameters()),
        "gradients": tensor_bytes(gradients),
        "optimizer_state": optimizer_bytes(optimizer),
    }


@contextlib.contextmanager
def saved_tensor_bytes(model: nn.Module) -> Iterator[dict[str, int]]:
    """Counts, in `["saved_tensors"]`, the bytes that autograd keeps for backward inside the block; parameters not among them."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address is given to another tensor meanwhile
    counted = {"saved_tensors": 0}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.device.type != "meta" and storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield counted
    counted["saved_tensors"] = sum(storage.nbytes() for storage in kept.values())


def trainable_parameters(model: nn.Module) -> int:
    """Number of trained values."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


class PeakMemory:
    """Peak resident memory of this process since this object was made, above what it held then; bytes.

    On Linux the kernel's high-water mark is reset; elsewhere the peak of the whole process counts, which `exact` tells.
    """

    def __init__(self) -> None:
        self.exact = False
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # give freed memory back first: only glibc can
            ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
            self.exact = True
        self._base = self._status("VmRSS") if self.exact else self._maximum()

    @staticmethod
    def _status(field: str) -> int:
        found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        assert found is not None
        return int(found[1]) * 1024

    @staticmethod
    def _maximum() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def bytes(self) -> int:
        """The peak so far."""
        now = self._status("VmHWM") if self.exact else self._maximum()
        return max(0, now - self._base)


def finite(value: float) -> float | None:
    """A number for JSON: None where it is not finite."""
    return value if math.isfinite(value) else None


def optimizer_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors in an optimiser's state."""
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
