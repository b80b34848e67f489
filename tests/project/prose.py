"""The sentences of a Markdown page, without its code, tables, generated parts and formulas."""

from __future__ import annotations

import re

_NOT_PROSE = (
    re.compile(r"^ *(`{3,}|~{3,}).*?^ *\1 *$", re.DOTALL | re.MULTILINE),  # fenced code
    re.compile(r"<!-- begin table.*?<!-- end table[^>]*-->", re.DOTALL),  # generated
    re.compile(r"<!--.*?-->", re.DOTALL),
    re.compile(r"\$\$.*?\$\$|\\\[.*?\\\]", re.DOTALL),
    re.compile(r"^ *\|.*$", re.MULTILINE),  # rows of tables
    re.compile(r"^!\[[^]]*\]\([^)]*\)$", re.MULTILINE),
)
_ONE_WORD = (
    re.compile(r"(`+).+?\1", re.DOTALL),  # code in a line
    re.compile(r"\$[^$]+\$|\\\(.+?\\\)", re.DOTALL),
)
_LINK = re.compile(r"!?\[([^]]*)\]\([^)]*\)")
_BLOCK = re.compile(r"\n *\n|\n(?= *(?:[-*+]|\d+\.) )|\n(?=#)|(?<=#)\n")
_ABBREVIATIONS = re.compile(r"\b(e\.g|i\.e|et al|cf|vs|resp|approx|no|eq|fig|sec)\.", re.IGNORECASE)
_END = re.compile(r"[.!?][)\"'*_]*(?=\s+[^a-z]|\s*$)")


def sentences(page: str) -> list[str]:
    """The sentences, with code and formulas in a line as one word each.

    >>> sentences("# Head\\n\\nUse `a, b. c` here. See\\n[this page](x.md), et al. again.\\n\\n| a | b |\\n\\n- One\\n- Two")
    ['Head', 'Use CODE here.', 'See this page, et al again.', 'One', 'Two']
    """
    for pattern in _NOT_PROSE:
        page = pattern.sub("\n\n", page)
    for pattern in _ONE_WORD:
        page = pattern.sub("CODE", page)
    page = _ABBREVIATIONS.sub(r"\1", _LINK.sub(r"\1", page))
    found = []
    for block in _BLOCK.split(re.sub(r"(?m)^(#.*)$", r"\1\n", page)):
        text = " ".join(re.sub(r"^ *(?:#+|[-*+]|\d+\.) ", "", block).split())
        start = 0
        for end in _END.finditer(text):
            found.append(text[start : end.end()].strip())
            start = end.end()
        found.append(text[start:].strip())
    return [each for each in found if re.search(r"\w", each)]


def words(sentence: str) -> int:
    """How many there are; signs between spaces are none.

    >>> words("**Two** + x: CODE, and a word-like thing")
    7
    """
    return len(re.findall(r"\S*\w\S*", sentence))


def code_lines(page: str) -> list[str]:
    """The lines of fenced code.

    >>> code_lines("a\\n```sh\\nmake\\n```\\nb")
    ['make']
    """
    return [line for fence in _NOT_PROSE[0].finditer(page) for line in fence[0].strip().splitlines()[1:-1]]
