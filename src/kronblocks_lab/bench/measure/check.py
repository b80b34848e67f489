"""Check outputs and gradients against float64, on the operands that are timed, before any timing.

In fp32 outputs are checked by Freivalds' method ("Probabilistic machines can use less running time", 1977): y V = x (W^T V) with
a few columns V of random signs. A wrong y practically never passes. In tf32 and bf16 rounding is larger than one wrong number
among thousands. There outputs are compared number by number, and so are gradients of parameters in every precision.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from kronblocks.core.errors import KronblocksError

_PROBES = 4
# relative to the root mean square of what is compared. fp32 sums of these lengths err by some 1e-6 of it (gradients, longer sums,
# by some 1e-5); one wrong element among n of an output changes a probe by 1/sqrt(n) of it, 1e-2
_OUTPUT, _GRADIENT = 1e-4, 1e-3
# a number of bf16 is rounded by up to 2^-9 of it; of one that a tf32 product takes the bits below 2^-10 may be dropped, which
# makes all products smaller; and the largest of many numbers are five times their root mean square: two stages err by that
_TOLERANCES = {"fp32": (_OUTPUT, _GRADIENT), "tf32": (2e-2, 5e-2), "bf16": (4e-2, 8e-2)}


@runtime_checkable
class HasDenseWeight(Protocol):
    """A layer that can build its weight, (out_features, in_features), differentiably."""

    def dense_weight(self) -> Tensor: ...


@dataclass(frozen=True)
class Expected:
    """What float64 says of a layer."""

    weight: Tensor
    bias: Tensor
    gradients: Mapping[str, Tensor]  # of the parameters, by name


class Truth:
    """Float64 results for one input and one gradient of the output.

    Args:
        x: (rows, n).
        dy: (rows, m).
        precision: of the products to check: "fp32", "tf32" or "bf16".
    """

    def __init__(self, x: Tensor, dy: Tensor, precision: str = "fp32") -> None:
        self._output, self._gradient = _TOLERANCES[precision]
        self._whole = precision != "fp32"
        self._x, self._dy = x.detach().double(), dy.double()
        generator = torch.Generator().manual_seed(0)
        self._probes = {
            n: (torch.randint(0, 2, (n, _PROBES), generator=generator).double() * 2 - 1).to(x.device)
            for n in {x.shape[1], dy.shape[1]}
        }

    def _seen(self, result: Tensor, n: int) -> Tensor:
        """What is compared of a (rows, n) result: itself, or its products with the probes."""
        return result.double() if self._whole else result.double() @ self._probes[n]

    def _product(self, left: Tensor, right: Tensor, n: int) -> Tensor:
        """The same of left @ right."""
        return left @ self._seen(right, n)

    def _compare(self, name: str, what: str, got: Tensor, shape: torch.Size, wanted: Tensor) -> None:
        if got.shape != shape:
            raise KronblocksError(f"{name}: the {what} is {tuple(got.shape)}, not {tuple(shape)}: nothing was timed")
        _close(name, what, self._seen(got.detach(), shape[1]), wanted, self._output)

    @functools.cached_property
    def _dweight(self) -> Tensor:
        """The gradient of a dense weight, (m, n): every parameter's gradient follows from it."""
        return self._dy.t() @ self._x

    def expect(self, layer: nn.Module, *, gradients: bool) -> Expected:
        """What a layer with `dense_weight()` and a bias should give."""
        exact = copy.deepcopy(layer).double()
        weight, found = dense_weight(exact), {}
        if gradients:
            names = [name for name, _ in exact.named_parameters() if name != "bias"]
            parameters = [exact.get_parameter(name) for name in names]
            found = dict(zip(names, torch.autograd.grad(weight, parameters, self._dweight), strict=True))
            found["bias"] = self._dy.sum(0)
        return Expected(weight.detach(), exact.get_parameter("bias").detach(), found)

    def check_output(self, name: str, y: Tensor, expected: Expected) -> None:
        """Raise KronblocksError if y is not x W^T + bias."""
        m = self._dy.shape[1]
        wanted = self._product(self._x, expected.weight.t(), m) + self._seen(expected.bias, m)
        self._compare(name, "output", y, self._dy.shape, wanted)

    def check_gradients(self, name: str, dx: Tensor, gradients: Mapping[str, Tensor], expected: Expected) -> None:
        """Raise KronblocksError if the gradients are not those of <dy, y>."""
        wanted = self._product(self._dy, expected.weight, self._x.shape[1])
        self._compare(name, "gradient of the input", dx, self._x.shape, wanted)
        for parameter, gradient in gradients.items():
            _close(name, f"gradient of {parameter}", gradient.double(), expected.gradients[parameter], self._gradient)


def dense_weight(layer: nn.Module) -> Tensor:
    """The weight of a layer, built by the plain formulas."""
    if isinstance(layer, nn.Linear):
        return layer.weight
    assert isinstance(layer, HasDenseWeight)
    weight = layer.dense_weight()
    return weight


def _close(name: str, what: str, got: Tensor, wanted: Tensor, tolerance: float) -> None:
    size = wanted.square().mean().sqrt()
    error = (got - wanted).abs().max() / size if size > 0 else got.abs().max()
    if not error <= tolerance:
        raise KronblocksError(f"{name}: the {what} is wrong by {float(error):.1e} of its size: nothing was timed")
