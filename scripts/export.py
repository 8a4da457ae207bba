"""Exports the weights and the evaluation program of a run; the same as `jaxft export`."""

import sys

from jaxft.cli.commands import run_program

if __name__ == "__main__":
    run_program("export", sys.argv[1:], f"python {sys.argv[0]}")
