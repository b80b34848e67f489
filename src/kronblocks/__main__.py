"""`python -m kronblocks`."""

from kronblocks.cli import main

main()
