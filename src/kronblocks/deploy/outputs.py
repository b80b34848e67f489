"""Call a model with an example, and compare the outputs of two models."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kronblocks.core.errors import KronblocksError


def arguments(example: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """The positional and keyword arguments of an example."""
    if isinstance(example, Mapping):
        return (), example
    return (example if isinstance(example, tuple) else (example,)), {}


@torch.no_grad()
def call(model: nn.Module, example: Any) -> Any:
    """The model's output for an example, without gradients."""
    return run_example(model, prepared(example))


def run_example(model: nn.Module, example: Any) -> Any:
    """The model's output for an example; or what a function of the model returns."""
    if callable(example):
        return example(model)
    args, kwargs = arguments(example)
    return model(*args, **kwargs)


def prepared(example: Any) -> Any:
    """The example for one call: a copy if it holds something that a call may change, such as a cache of keys and values."""
    return example if callable(example) or _is_plain(example) else copy.deepcopy(example)


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, Tensor | str | int | float)


def call_or_refuse(model: nn.Module, example: Any) -> Any:
    try:
        return call(model, example)
    except Exception as error:  # the model's code may raise anything
        raise KronblocksError(
            f"the model cannot be called with the example ({type(error).__name__}: {error}): give its forward's input, as a "
            "tensor, a tuple of arguments, a dict of keyword arguments, or a function of the model"
        ) from error


def tensors(output: Any) -> Iterator[Tensor]:
    """The floating-point tensors in a model's output, in order."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output.detach().clone()
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from tensors(value)


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Largest difference, relative to the largest finite number of theirs; infinite if shapes, NaNs or infinities differ."""
    if [t.shape for t in ours] != [t.shape for t in theirs]:
        return float("inf")
    largest = most = 0.0
    for own, other in zip(ours, theirs, strict=True):
        finite = other.isfinite()
        if not torch.equal(own[~finite].nan_to_num(nan=0.5), other[~finite].nan_to_num(nan=0.5)):
            return float("inf")
        if finite.any():
            gap = (own[finite] - other[finite]).abs().max()
            largest, most = max(largest, float(other[finite].abs().max())), max(most, float(gap.nan_to_num(nan=float("inf"))))
    return most / largest if largest > 0 else most
