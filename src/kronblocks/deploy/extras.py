"""Encode modules' extra state: plain values go into the card, tensors into the weights' file."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor

from kronblocks.core.errors import KronblocksError


def is_extra(name: str, value: Any) -> bool:
    """Whether an entry of a state_dict is a module's extra state, or anything else but a tensor."""
    return not isinstance(value, Tensor) or name.rpartition(".")[2] == "_extra_state"


def encoded(name: str, value: Any, keep: Callable[[Tensor], str]) -> Any:
    """Encode a value as JSON. Dicts, lists and tuples are marked, so that they keep their types.

    Args:
        name: of the entry.
        value: numbers, text, bools, None and tensors; dicts with text keys, lists and tuples of these.
        keep: puts a tensor into the file and returns its name there.

    Raises:
        KronblocksError: it holds something else, which only a pickle could store. Pickles are never written or read.
    """
    kind = type(value)
    if isinstance(value, Tensor):
        return {"tensor": keep(value)}
    if kind in (dict, OrderedDict) and all(type(key) is str for key in value):
        return {"dict": {key: encoded(name, each, keep) for key, each in value.items()}}
    if kind in (list, tuple):
        return {kind.__name__: [encoded(name, each, keep) for each in value]}
    if kind is float and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or kind in (bool, int, float, str):
        return value
    raise KronblocksError(
        f"{name} holds a {kind.__name__}, which only a pickle could store: let get_extra_state return tensors, numbers, text, "
        "None, and dicts (with text keys), lists and tuples of these"
    )


def decoded(code: Any, read: Callable[[str], Tensor]) -> Any:
    """The reverse of `encoded`.

    Raises:
        KronblocksError: the code is something else.
    """
    if code is None or isinstance(code, bool | int | float | str):
        return code
    match list(code.items()) if isinstance(code, dict) else []:
        case [("tensor", str(name))]:
            return read(name)
        case [("float", "inf" | "-inf" | "nan" as word)]:
            return float(word)
        case [("dict", dict(inner))]:
            return {key: decoded(each, read) for key, each in inner.items()}
        case [("list", list(inner))]:
            return [decoded(each, read) for each in inner]
        case [("tuple", list(inner))]:
            return tuple(decoded(each, read) for each in inner)
    raise KronblocksError(f"{str(code)[:60]!r} is no extra state")
