"""Shows examples of docstrings on the site as code: an extension of griffe."""

from __future__ import annotations

from typing import Any

import griffe


def fenced(text: str) -> str:
    """A docstring with each doctest, up to an empty line, between fences."""
    lines, inside = [], False
    for line in text.splitlines():
        if not inside and line.lstrip().startswith(">>> "):
            lines.append("```pycon")
            inside = True
        elif inside and not line.strip():
            lines.append("```")
            inside = False
        lines.append(line)
    return "\n".join([*lines, "```"] if inside else lines)


class Doctests(griffe.Extension):
    """Fences the doctests of everything."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change a docstring once it has been read."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
