"""Averages the weights of several runs; the same as `jaxft soup`."""

import sys

from jaxft.cli.commands import run_program

if __name__ == "__main__":
    run_program("soup", sys.argv[1:], f"python {sys.argv[0]}")
