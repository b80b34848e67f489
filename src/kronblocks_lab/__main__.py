"""The command line: reads settings, calls the experiments, prints. No logic of its own."""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import NoReturn

from kronblocks_lab.commands import COMMANDS, run, usage


def _fail(message: str) -> NoReturn:
    sys.stderr.write(f"kronblocks: {message}\n")
    raise SystemExit(2)


def main(args: list[str] | None = None) -> None:
    """Entry point of the command `kronblocks`."""
    words = (sys.argv[1:] if args is None else args) or ["--help"]
    name = words[0]
    if name in ("-h", "--help", "--version"):
        sys.stdout.write(usage() if name != "--version" else f"kronblocks {version('kronblocks')}\n")
        return
    try:
        run(words)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("kronblocks"):
            raise
        _fail(f"this command needs the package {error.name}: pip install 'kronblocks[experiments]'")
    except KeyboardInterrupt:
        sys.stderr.write(f"kronblocks: interrupted{COMMANDS[name].interrupted}\n")
        raise SystemExit(130) from None
    except Exception as error:
        from kronblocks.core.errors import KronblocksError  # imports torch, which help does without

        if not isinstance(error, KronblocksError):
            raise
        _fail(str(error))


if __name__ == "__main__":
    main()
