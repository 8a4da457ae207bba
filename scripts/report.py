"""Writes the report of a run, or compares runs; the same as `jaxft report`."""

import sys

from jaxft.cli.commands import run_program

if __name__ == "__main__":
    run_program("report", sys.argv[1:], f"python {sys.argv[0]}")
