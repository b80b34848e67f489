"""The layers of a model by name and type, and which of them a pattern means."""

from __future__ import annotations

import difflib
import fnmatch
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from kronblocks.core.errors import KronblocksError
from kronblocks.nn.base import BlockLayer
from kronblocks.nn.unfolded import Unfolded, is_transposed, unfolded
from kronblocks.surgery.reasons import (
    is_convolution,
    linear_sizes,
)


@dataclass(frozen=True)
class Layer:
    """A linear layer of a model, or the one that a convolution or Conv1D will have inside."""

    name: str  # of the linear layer
    place: str  # name of the module that users know
    module: nn.Module  # the module that holds the weight now
    cols_divide: int | None = None  # a number that the columns of blocks must divide; None: the layer's columns

    @property
    def is_there(self) -> bool:
        """Whether the linear layer is in the model already."""
        return isinstance(self.module, nn.Linear | BlockLayer)

    @property
    def sizes(self) -> tuple[int, int]:
        """Rows and columns of the weight."""
        if sizes := linear_sizes(self.module):
            return sizes
        first, *others = self.module.get_parameter("weight").shape
        return first, math.prod(others)

    @property
    def values(self) -> list[nn.Parameter]:
        """The parameters that hold the weight."""
        if isinstance(self.module, BlockLayer):
            return self.module.block_parameters()
        return [self.module.get_parameter("weight")]

    def weight(self) -> Tensor:
        """The weight in the linear layer's layout, (rows, columns)."""
        if isinstance(self.module, BlockLayer):
            return self.module.dense_weight()
        around = unfolded(self.module, convolutions=True)
        return self.module.get_parameter("weight") if around is None else around.linear.weight


class Names:
    """The modules of a model, with the names and types of everything around them."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())

    def layers(self) -> list[Layer]:
        """All linear layers, and modules that can be made one."""
        kinds, found = (nn.Linear, BlockLayer), []
        for name, module in self.modules.items():
            around = self.modules[name.rpartition(".")[0]] if "." in name else None
            if isinstance(module, kinds) and isinstance(around, Unfolded):
                found.append(Layer(name, name.rpartition(".")[0], module, around.block_cols_divide))
            elif isinstance(module, kinds):
                found.append(Layer(name, name, module))
            elif is_transposed(module) or is_convolution(module):
                channels = getattr(module, "in_channels", None)
                found.append(Layer(f"{name}.linear", name, module, channels))
        return found

    def path(self, name: str) -> list[str]:
        """A module's name, after the names of the modules around it, without the model."""
        parts = name.split(".")
        return [".".join(parts[: i + 1]) for i in range(len(parts))]

    def matches(self, layer: Layer, pattern: str) -> bool:
        """Whether a pattern matches a layer, by its name or by that of the convolution around it."""
        return any(self.matches_name(name, pattern) for name in {layer.name, layer.place})

    def matches_name(self, name: str, pattern: str) -> bool:
        """Whether a pattern matches a name, or the type of a module there or around it."""
        if pattern.startswith("re:"):
            return re.fullmatch(pattern[3:], name) is not None
        if pattern.startswith("type:"):
            around = [self.modules[path] for path in self.path(name) if path in self.modules]
            return any(pattern[5:] == kind.__qualname__ for module in around for kind in type(module).__mro__[:-1])
        return fnmatch.fnmatchcase(name, pattern)

    def adapter(self, name: str) -> str:
        """The type of the PEFT adapter that a layer is a part of; "" if it is none."""
        for path in self.path(name)[1:]:
            outer, _, part = path.rpartition(".")
            own = getattr(self.modules.get(outer), "adapter_layer_names", ())
            if part in own and part != "modules_to_save":  # these are whole layers
                return type(self.modules[outer]).__name__
        return ""

    def check(self, what: str, patterns: Iterable[str], candidates: Sequence[str]) -> None:
        """Refuse patterns that match none of the candidates."""
        for pattern in patterns:
            if pattern != "*" and not any(self.matches_name(name, pattern) for name in candidates):
                near = difflib.get_close_matches(pattern, candidates, n=3, cutoff=0.4) or candidates[:5]
                raise KronblocksError(f"{what} pattern {pattern!r} matches no nn.Linear layer; there are {', '.join(near)}, ...")


def texts(patterns: Iterable[str | type]) -> list[str]:
    return [pattern for pattern in patterns if isinstance(pattern, str)]


def check_expressions(what: str, patterns: Iterable[str]) -> None:
    for pattern in patterns:
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise KronblocksError(f"{what} pattern {pattern!r} is no regular expression: {error}") from error
