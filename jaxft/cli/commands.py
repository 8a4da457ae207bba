"""The commands of the `jaxft` program, each in a file of its name.

Importing this module imports no large package, so that the program handles signals before it
imports jax.
"""

import gc
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module, metadata
from typing import NamedTuple

from jaxft.cli.process import exit_on_signal, exit_process, fail, show


class Command(NamedTuple):
    """A command of the program.

    Attributes:
      module: the file in `jaxft.cli`; its `run(arguments, program)` returns an exit code.
      summary: the line in `jaxft --help`.
      stopped: the rest of the message after the name of a signal that arrives during imports.
    """

    module: str
    summary: str
    stopped: str = "came; nothing has been done."


COMMANDS = {
    "finetune": Command(
        "finetune",
        "Train a network in stages, or resume an interrupted run.",
        "came before training; the same command starts or resumes the run.",
    ),
    "compare": Command(
        "compare",
        "Compare fine-tuning strategies on your images.",
        "came before training; the same command starts or resumes the comparison.",
    ),
    "soup": Command("soup", "Average the weights of several runs."),
    "predict": Command("predict", "Classify image files with the weights of a run."),
    "evaluate": Command("evaluate", "Score weights on labelled images, class by class."),
    "report": Command("report", "Write the report of a run as a page, or compare runs."),
    "plan": Command("plan", "Estimate time and memory of each stage without data or a TPU."),
    "export": Command("export", "Export the weights and the evaluation program of a run."),
    "push": Command("push", "Upload an export to the Hugging Face hub."),
    "recipes": Command("recipes", "List the recipes that come with jaxft, or copy one."),
    "convert": Command("convert", "Convert weights between PyTorch and JAX."),
    "find-lr": Command("find_lr", "Find a learning rate with a range test."),
    "probe-layers": Command("probe_layers", "Compare gradients and weights of each block."),
    "prepare-tfds": Command("prepare_tfds", "Convert a folder of images to a TFDS data set."),
    "doctor": Command("doctor", "Report versions, devices, caches and missing extras."),
}


def main(arguments: Sequence[str] | None = None, program: str = "jaxft") -> int:
    """Runs the `jaxft` program; returns its exit code, or exits with it after an error.

    Args:
      arguments: the command line after the program's name. Default: `sys.argv[1:]`.
      program: the program's name in messages.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments:
        return fail(help_text(program), 2)
    name, *rest = arguments
    if name in ("-h", "--help"):
        show(help_text(program))
    elif name in ("-V", "--version"):
        show(f"jaxft {version()}")
    elif name not in COMMANDS:
        return fail(f"{program}: {unknown(name)}", 2)
    else:
        run_program(name, rest, f"{program} {name}")
    return 0


def run_program(name: str, arguments: Sequence[str], program: str) -> None:
    """Runs a command as the only work of this process; exits unless the command succeeds.

    Args:
      name: one of `COMMANDS`.
      arguments: the command's arguments.
      program: the command as the user typed it, for help texts: "python scripts/export.py".
    """
    command = COMMANDS[name]
    exit_on_signal(command.stopped)
    gc.disable()  # nothing that an import creates is garbage, and collections would walk over it
    module = import_module(f"jaxft.cli.{command.module}")
    gc.freeze()
    gc.enable()
    exit_process(module.run(arguments, program))


def help_text(program: str) -> str:
    """Returns the text of `jaxft --help`, at most 24 lines of 80 columns."""
    width = max(map(len, COMMANDS))
    commands = (f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items())
    return "\n".join(
        [
            "Staged fine-tuning for JAX.",
            "",
            f"usage: {program} COMMAND [arguments]",
            f"       {program} COMMAND --help",
            f"       {program} --version",
            "",
            *commands,
            "",
            "Exit codes: 0 success, 1 error, 2 wrong arguments. After 75 (SIGTERM, or loss of",
            "another process) and 130 (Ctrl-C), the same finetune or compare command resumes.",
        ]
    )


def version() -> str:
    """Returns the version of the installed package."""
    try:
        return metadata.version("jaxft")
    except metadata.PackageNotFoundError:  # a checkout on the path
        return "(not installed)"


def unknown(name: str) -> str:
    """Returns the error message for a command that does not exist."""
    matches = get_close_matches(name.replace("_", "-"), COMMANDS, n=1, cutoff=0.5)
    hint = f" Did you mean {matches[0]!r}?" if matches else ""
    return f"there is no command {name!r}.{hint} Commands: {', '.join(COMMANDS)}."
