"""Classifies image files with the weights of a run; the same as `jaxft predict`."""

import sys

from jaxft.cli.commands import run_program

if __name__ == "__main__":
    run_program("predict", sys.argv[1:], f"python {sys.argv[0]}")
