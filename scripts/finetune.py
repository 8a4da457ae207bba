"""Fine-tunes a network in stages, or resumes an interrupted run; the same as `jaxft finetune`."""

import sys

from jaxft.cli.commands import run_program

if __name__ == "__main__":
    run_program("finetune", sys.argv[1:], f"python {sys.argv[0]}")
