"""What the fuzz tests share: values of any kind, what a refusal must look like, and everything of a model as plain bits."""

from __future__ import annotations

import contextlib
import os
import resource
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from kronblocks import KronblocksError
from kronblocks.algorithms.training.sparsifier import Sparsifier
from kronblocks.nn.base import BlockLayer

FULL = os.environ.get("KRONBLOCKS_RELIABILITY") == "full"
QUIET: Any = {"deadline": None, "database": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["auto", "4x4", "16", "*"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def cases(few: int, many: int) -> int:
    """How many examples to try."""
    return many if FULL else few


class Tally:
    """How many cases were refused, and how many were accepted and looked at."""

    def __init__(self) -> None:
        self.refused = self.accepted = 0

    @property
    def tried(self) -> int:
        return self.refused + self.accepted

    def check(self, share: float) -> None:
        """At least this share of both, so that a fuzz that refuses everything, or accepts everything, fails."""
        assert min(self.refused, self.accepted) >= share * self.tried, vars(self)


def refused(run: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    """Whether it was refused in the way that it should be; any other error goes through."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(*args, **kwargs)
    except KronblocksError as error:
        assert str(error)
        return True
    return False


@contextlib.contextmanager
def at_most(mebibytes: int) -> Iterator[None]:
    """Fail whatever allocates more than this, even memory that is never touched."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + mebibytes * 2**20, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def small() -> nn.Sequential:
    """The model that most of these tests damage."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def bits(value: Any) -> Any:
    """Plain values and tensors as something that `==` compares bit for bit, NaN and signs of zeros included."""
    if isinstance(value, Tensor):
        if is_lazy(value):
            return "not made yet"
        shown = (str(value.dtype), tuple(value.shape), value.requires_grad)
        return shown if value.is_meta else (*shown, value.detach().cpu().contiguous().flatten().view(torch.uint8).tolist())
    if isinstance(value, dict):
        return {key: bits(each) for key, each in value.items()}
    return [bits(each) for each in value] if isinstance(value, list | tuple) else repr(value)


def everything(model: nn.Module, *others: Any) -> Any:
    """A model's modules, parameters (which objects, and their bits), buffers and modes, and whatever else may not change."""
    modules = [(name, id(module), module.training) for name, module in model.named_modules(remove_duplicate=False)]
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return modules, [(name, id(tensor), bits(tensor)) for name, tensor in tensors], bits(list(others))


def check_sparsity(model: nn.Module, sparsifier: Sparsifier, wanted: float, scope: str = "global") -> None:
    """The zeros, counted in the dense weights, are what was asked for, and with a block less they would be too few."""
    counted = []
    for target in sparsifier.targets:
        layer = model.get_submodule(target.name)
        weight = layer.dense_weight() if isinstance(layer, BlockLayer) else layer.weight
        dead = ~(target.grid.to_blocks(weight.detach()) != 0).flatten(2).any(2)
        counted.append((int(dead.sum()) * target.area, weight.numel(), target.area))
    if not counted:
        return
    zeros, weights, areas = zip(*counted, strict=True)
    assert sparsifier.sparsity == pytest.approx(sum(zeros) / sum(weights), abs=1e-9)
    for dead, total, area in counted if scope == "layer" else [(sum(zeros), sum(weights), max(areas))]:
        assert wanted * total - 1e-6 <= dead < wanted * total + area, counted
