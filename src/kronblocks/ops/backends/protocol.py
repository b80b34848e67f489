"""Backend: the functions of a backend. Each backend is a module: `torch`, `native` and the package `triton`."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kronblocks.ops.index import BlockIndex
from kronblocks.ops.plans import Plan
from kronblocks.ops.problem import Problem

CALL_SECONDS = 5e-5
"""Rough overhead of one call of our operators, in seconds."""


class Backend(Protocol):
    """The products of a backend, and how fast they are expected to be."""

    name: str

    wants_masks: bool
    """Whether products with factors get a mask even if no block is dead. False: they get None then."""

    def serves(self, device: str, dtype: torch.dtype, *, warn: bool) -> bool:
        """Whether it computes for a device type and dtype here. With `warn`, warn once if it should, but cannot."""
        ...

    def build(self) -> str:
        """The version of the kernels, or "". It is a part of the keys of timings."""
        ...

    def efficiency(self, problem: Problem, plan: Plan) -> float:
        """Expected rate of a plan's products, as a share of a dense product's rate. Not called for "dense", where it is 1."""
        ...

    def keeps_on_chip(self, problem: Problem, plan: Plan) -> bool:
        """Whether the intermediate between a plan's two stages never reaches the device's memory."""
        ...

    def call_seconds(self, problem: Problem, plan: Plan) -> float:
        """Overhead of the calls of one step, in seconds."""
        ...

    def packed_linear(self, x: Tensor, values: Tensor, index: BlockIndex, bias: Tensor | None = None) -> Tensor:
        """y = x W^T + bias; x (rows, n) -> (rows, m)."""
        ...

    def packed_grad_input(self, dy: Tensor, values: Tensor, index: BlockIndex) -> Tensor:
        """dx = dy W; dy (rows, m) -> (rows, n)."""
        ...

    def packed_grad_values(self, dy: Tensor, x: Tensor, index: BlockIndex) -> Tensor:
        """The live blocks of dy^T x, (capacity, bm, bn); 0 in slots that the index does not list."""
        ...

    def kron_linear(
        self, x: Tensor, coeff: Tensor, tiles: Tensor, bias: Tensor | None, live: Tensor | None, plan: Plan
    ) -> Tensor:
        """y = x W^T + bias by a plan that works without an index; x (rows, n) -> (rows, m)."""
        ...

    def kron_backward(
        self, dy: Tensor, x: Tensor, coeff: Tensor, tiles: Tensor, live: Tensor | None, plan: Plan, input_grad: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """dx (rows, n) or None, dcoeff, exactly 0 for dead blocks, and dtiles."""
        ...

    def live_blocks(self, coeff: Tensor, tiles: Tensor, index: BlockIndex) -> Tensor:
        """The live blocks of W in the order of the index's entries, (capacity, bm, bn); the rest is 0."""
        ...

    def live_blocks_backward(self, dvalues: Tensor, coeff: Tensor, tiles: Tensor, index: BlockIndex) -> tuple[Tensor, Tensor]:
        """dcoeff, exactly 0 for dead blocks, and dtiles."""
        ...
