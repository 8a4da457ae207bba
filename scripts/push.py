"""Uploads an export to the Hugging Face hub; the same as `jaxft push`."""

import sys

from jaxft.cli.commands import run_program

if __name__ == "__main__":
    run_program("push", sys.argv[1:], f"python {sys.argv[0]}")
