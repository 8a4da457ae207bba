"""Runs the `jaxft` program as `python -m jaxft`."""

import sys

from jaxft.cli.commands import main

if __name__ == "__main__":
    sys.exit(main(program="python -m jaxft"))
