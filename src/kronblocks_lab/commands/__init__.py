"""The subcommands of `kronblocks`: each reads settings, calls the library and prints.

A subcommand is imported when it is called. So `advise`, `doctor`, `export` and `inspect` need no package of the laboratory, and
`kronblocks --help` does not import torch.
"""

from __future__ import annotations

import difflib
import importlib
from typing import NamedTuple

_RESUME = "; the same command with --resume goes on from the last checkpoint"
_AGAIN = "; what is finished is kept, and the same command goes on from there"


class Command(NamedTuple):
    """A subcommand."""

    module: str  # whose main() it is
    what: str
    interrupted: str = ""  # how to go on


COMMANDS = {
    "train": Command("kronblocks_lab.commands.train", "train one model and show the result", _RESUME),
    "compare": Command(
        "kronblocks_lab.commands.compare", "run several methods and seeds of one task and make one report", _RESUME
    ),
    "report": Command("kronblocks_lab.commands.report", "write the report of finished trainings again"),
    "search": Command("kronblocks_lab.commands.search", "find the block size for a model and its data"),
    "advise": Command(
        "kronblocks_lab.commands.advise",
        "measure a model's shapes on this machine: what to make sparse, and what it gains",
    ),
    "doctor": Command("kronblocks_lab.commands.doctor", "look whether what should work on this machine does, for bug reports"),
    "export": Command("kronblocks_lab.commands.export", "write a finished training's model in the form that runs fastest here"),
    "inspect": Command("kronblocks_lab.commands.inspect", "show what a saved model holds: layers, blocks, tensors and bytes"),
    "bench": Command(
        "kronblocks_lab.bench.commands", "measure speed and memory against dense, and write the page of the results", _AGAIN
    ),
    "reproduce": Command("kronblocks_lab.reproduce.commands", "run the experiments behind the tables of the docs", _AGAIN),
}


def run(args: list[str]) -> None:
    """Run a command line, which begins with the subcommand.

    Raises:
        KronblocksError: there is no such subcommand, or it failed.
    """
    import tyro

    from kronblocks.core.errors import KronblocksError
    from kronblocks_lab.commands.arguments import REGISTRY

    name, *rest = args
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise KronblocksError(f"there is no command {name!r}: {meant}write one of {', '.join(COMMANDS)}, or kronblocks --help")
    tyro.cli(importlib.import_module(COMMANDS[name].module).main, args=rest, prog=f"kronblocks {name}", registry=REGISTRY)


def usage() -> str:
    """The list of subcommands, one per line."""
    lines = "".join(f"  {name:<10} {command.what}\n" for name, command in COMMANDS.items())
    return (
        "usage: kronblocks COMMAND ...\n\nNeural networks with block-sparse weights: train, compare, search, export, measure.\n\n"
        f"{lines}\nkronblocks COMMAND --help lists its settings.\n"
    )
