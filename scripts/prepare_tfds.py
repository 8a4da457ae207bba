"""Converts a folder of images to a TFDS data set; the same as `jaxft prepare-tfds`."""

import sys

from jaxft.cli.commands import run_program

if __name__ == "__main__":
    run_program("prepare-tfds", sys.argv[1:], f"python {sys.argv[0]}")
