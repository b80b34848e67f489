"""The subcommands of `kronblocks`: each reads settings, calls, prints.

A subcommand is imported when it is called, so that `advise`, `export` and `inspect` need no package of the laboratory.
"""

from __future__ import annotations

import difflib
import importlib
import sys

import tyro

import kronblocks
from kronblocks.core.errors import KronblocksError

COMMANDS = {  # the module whose main() it is, and what it does
    "train": ("kronblocks_lab.commands.train", "train one model and show what came out"),
    "compare": ("kronblocks_lab.commands.compare", "run several methods and seeds of one task and make one report"),
    "report": ("kronblocks_lab.commands.report", "make the report of finished trainings again"),
    "search": ("kronblocks_lab.commands.search", "find the block size for a model and its data"),
    "advise": (
        "kronblocks_lab.commands.advise",
        "measure a model's shapes on this machine: what to make sparse, and what it gains",
    ),
    "export": ("kronblocks_lab.commands.export", "write a finished training's model in the form that runs fastest here"),
    "inspect": ("kronblocks_lab.commands.inspect", "show what a saved model holds: layers, blocks, tensors and bytes"),
    "bench": ("kronblocks_lab.bench.commands", "measure speed and memory against dense, and write the page of the results"),
    "reproduce": ("kronblocks_lab.reproduce.commands", "run the experiments behind the tables of the docs"),
}


def run(args: list[str] | None = None) -> None:
    """Read the command line and do what it says.

    Raises:
        KronblocksError: there is no such subcommand, or it cannot do what it is asked for.
    """
    name, *rest = (sys.argv[1:] if args is None else args) or ["--help"]
    if name in ("-h", "--help", "--version"):
        sys.stdout.write(usage() if name != "--version" else f"kronblocks {kronblocks.__version__}\n")
        return
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise KronblocksError(f"there is no command {name!r}: {meant}write one of {', '.join(COMMANDS)}, or kronblocks --help")
    tyro.cli(importlib.import_module(COMMANDS[name][0]).main, args=rest, prog=f"kronblocks {name}")


def usage() -> str:
    """What there is, a line each."""
    lines = "".join(f"  {name:<10} {what}\n" for name, (_, what) in COMMANDS.items())
    return (
        "usage: kronblocks COMMAND ...\n\nNeural networks with block-sparse weights: train, compare, search, export, measure.\n\n"
        f"{lines}\nkronblocks COMMAND --help says what each one takes.\n"
    )
