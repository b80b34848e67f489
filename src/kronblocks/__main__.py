"""`python -m kronblocks`."""

from kronblocks.cli import main

if __name__ == "__main__":
    main()
