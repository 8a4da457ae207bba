"""Finds a learning rate with a range test; the same as `jaxft find-lr`."""

import sys

from jaxft.cli.commands import run_program

if __name__ == "__main__":
    run_program("find-lr", sys.argv[1:], f"python {sys.argv[0]}")
