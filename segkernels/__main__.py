"""``python -m segkernels``: the command."""

from segkernels.cli import main

if __name__ == "__main__":
    main()
