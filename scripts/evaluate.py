"""Scores weights on labelled images, class by class; the same as `jaxft evaluate`."""

import sys

from jaxft.cli.commands import run_program

if __name__ == "__main__":
    run_program("evaluate", sys.argv[1:], f"python {sys.argv[0]}")
