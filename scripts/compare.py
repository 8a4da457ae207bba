"""Compares fine-tuning strategies on your images; the same as `jaxft compare`."""

import sys

from jaxft.cli.commands import run_program

if __name__ == "__main__":
    run_program("compare", sys.argv[1:], f"python {sys.argv[0]}")
