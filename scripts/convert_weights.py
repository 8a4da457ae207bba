"""Converts weights between PyTorch and JAX; the same as `jaxft convert`."""

import sys

from jaxft.cli.commands import run_program

if __name__ == "__main__":
    run_program("convert", sys.argv[1:], f"python {sys.argv[0]}")
