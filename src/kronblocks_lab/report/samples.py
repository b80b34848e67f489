"""What language models write, for a report: each beginning once, and what each row makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from kronblocks_lab.report.comparison import Row, Task


class Verbatim(str):
    """Text that a page shows as it is: spaces, line ends and all."""


class Sample(NamedTuple):
    """A beginning from the validation part, and how the first seed of each row goes on."""

    prompt: Verbatim
    temperature: float
    texts: list[tuple[Row, Verbatim]]


def samples(task: Task) -> list[Sample]:
    """The samples of a task; none of classifiers."""
    found: dict[tuple[str, float], list[tuple[Row, Verbatim]]] = {}
    for row in task.rows:
        written = row.runs[0].result.get("samples", {"temperature": 0, "texts": []})
        for each in written["texts"]:
            found.setdefault((each["prompt"], written["temperature"]), []).append((row, visible(each["text"])))
    return [Sample(visible(prompt), temperature, texts) for (prompt, temperature), texts in found.items()]


def are_samples(value: Any) -> bool:
    """Whether a part of a result.json can be shown."""
    if not isinstance(value, dict) or not isinstance(value.get("temperature"), int | float):
        return False
    texts = value.get("texts")
    return isinstance(texts, Sequence) and all(
        isinstance(each, dict) and all(isinstance(each.get(name), str) for name in ("prompt", "text")) for each in texts
    )


def visible(text: str) -> Verbatim:
    r"""A text without characters that cannot be shown; they are written as escapes.

    >>> visible("a\n\tb\r\x00é")
    'a\n\tb\\r\\x00é'
    """
    return Verbatim("".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text))
