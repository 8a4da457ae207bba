"""Parts of every command: its parser, its errors in one line, a check of its output folder."""

import argparse
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console as Terminal

from jaxft.checkpoint.atomic import in_bucket
from jaxft.cli.process import EXIT_CODES, fail, handled_by
from jaxft.data.validate import without_warnings
from jaxft.errors import InterruptedRunError, JaxftError, RecipeError
from jaxft.progress import show_progress_on


def command_parser(
    description: str | None, name: str, program: str, **options: Any
) -> argparse.ArgumentParser:
    """Returns a parser whose help shows the command as the user typed it.

    Args:
      description: help text, which names the command `name`.
      name: the command as in the text: "jaxft export".
      program: the command as typed: "python scripts/export.py".
      **options: further arguments of `argparse.ArgumentParser`.
    """
    return argparse.ArgumentParser(
        prog=program,
        description=_wrapped((description or "").replace(name, program)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **options,
    )


def _wrapped(text: str) -> str:
    """Wraps each paragraph to the terminal; indented lines stay as they are."""
    width = min(shutil.get_terminal_size().columns, 100)
    paragraphs = [
        each if each.startswith(" ") else textwrap.fill(each, width, break_on_hyphens=False)
        for each in text.strip().split("\n\n")
    ]
    return "\n\n".join(paragraphs)


def report_errors(main: Callable[[], int]) -> int:
    """Calls `main` and returns its exit code; prints an error of the user as one line.

    Returns 1 after a JaxftError or an OSError, the signal's exit code after an
    InterruptedRunError, and argparse's exit code after `--help` or wrong arguments.
    """
    try:
        return main()
    except InterruptedRunError as error:
        return fail(f"\n{error}", EXIT_CODES[signal.Signals(error.signal)])
    except (JaxftError, OSError) as error:
        return fail(f"{type(error).__name__}: {error}", 1)
    except SystemExit as error:
        if isinstance(error.code, str):
            return fail(error.code, 1)
        return int(error.code or 0)


def run_until_signal(main: Callable[[], None]) -> int:
    """Calls `main` as `report_errors` does; SIGTERM and SIGINT end it with one line."""
    received = signal.SIGINT

    def interrupt(number: int, _: FrameType | None) -> None:
        nonlocal received
        received = signal.Signals(number)
        raise KeyboardInterrupt

    def work() -> int:
        with without_warnings(), show_progress_on(Terminal(stderr=True)):
            main()
        if sys.stdout is not None:
            sys.stdout.flush()  # reports a full disk as an error of the command
        return 0

    with handled_by(interrupt):
        try:
            return report_errors(work)
        except KeyboardInterrupt:
            message = f"\n{received.name} came; stopped before the end."
            return fail(message, EXIT_CODES[received])


def check_writable(folder: Path) -> None:
    """Raises RecipeError unless the process may write to `folder`, which need not exist yet."""
    if in_bucket(folder):
        return
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise RecipeError(f"{nearest} is a file; {folder} must be a folder.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise RecipeError(f"{nearest} cannot be written; choose another place than {folder}.")


def count_argument(text: str) -> int:
    """Parses a number from 1 on, as the `type` of an argument of argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)
