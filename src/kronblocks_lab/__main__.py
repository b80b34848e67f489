"""The command line: reads settings, calls the experiments, prints. No logic of its own."""

from __future__ import annotations

import sys
from typing import NoReturn

from kronblocks.core.errors import KronblocksError


def _fail(message: str) -> NoReturn:
    sys.stderr.write(f"kronblocks: {message}\n")
    raise SystemExit(2)


def main(args: list[str] | None = None) -> None:
    """Entry point of the command `kronblocks`."""
    try:
        from kronblocks_lab.commands import run

        run(args)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("kronblocks"):
            raise
        _fail(f"this command needs the package {error.name}: pip install 'kronblocks[experiments]'")
    except KronblocksError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        sys.stderr.write("kronblocks: interrupted; the same command with --resume goes on from the last checkpoint\n")
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
