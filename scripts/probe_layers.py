"""Compares the gradient of each block with its weights; the same as `jaxft probe-layers`."""

import sys

from jaxft.cli.commands import run_program

if __name__ == "__main__":
    run_program("probe-layers", sys.argv[1:], f"python {sys.argv[0]}")
