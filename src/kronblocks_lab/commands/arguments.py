"""Read settings with the library's types from a command line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from kronblocks.config.methods import METHODS, Method
from kronblocks.config.parts import BlockSizeLike, Rank

REGISTRY = ConstructorRegistry()


def _terms(text: str) -> int | None:
    return None if text == "None" else int(text)


_WRITTEN: dict[Any, tuple[str, Callable[[str], Any]]] = {  # its name in the help, and its parser; the settings check values
    BlockSizeLike: ("SIZE", str),
    Rank: ("{None}|INT", _terms),
    Method: (f"{{{','.join(METHODS)}}}", str),  # or one that a module of --plugins registers
}


@REGISTRY.primitive_rule
def _of_the_library(kind: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    if kind.type not in _WRITTEN:
        return None
    metavar, read = _WRITTEN[kind.type]
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: read(words[0]),
        is_instance=lambda _: True,
        str_from_instance=lambda value: [str(value)],
    )
