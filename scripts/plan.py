"""Estimates the cost of each stage of a recipe; the same as `jaxft plan`."""

import sys

from jaxft.cli.commands import run_program

if __name__ == "__main__":
    run_program("plan", sys.argv[1:], f"python {sys.argv[0]}")
