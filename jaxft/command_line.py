"""The command line of all scripts: a recipe's fields as options, and an end in one line."""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import tyro

from jaxft.checkpoint.atomic import in_bucket
from jaxft.data.validate import without_warnings
from jaxft.errors import InterruptedRunError, JaxftError, RecipeError
from jaxft.recipe import Recipe
from jaxft.recipe_file import read
from jaxft.stages import Stage

# 75 is EX_TEMPFAIL of sysexits.h, "try again later"; 130 what shells have for Ctrl-C.
EXIT_CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}


def run(main: Callable[[list[str]], None]) -> None:
    """Runs a script's `main`; its errors, SIGTERM and SIGINT end the program with one line."""
    came = signal.SIGINT

    def stop(number: int, _: object) -> None:
        nonlocal came
        came = signal.Signals(number)
        raise KeyboardInterrupt

    for number in EXIT_CODES:
        signal.signal(number, stop)
    try:
        with without_warnings():
            main(sys.argv[1:])
    except InterruptedRunError as stopped:
        leave(f"\n{stopped}", EXIT_CODES[signal.Signals(stopped.signal)])
    except (JaxftError, OSError) as error:
        leave(f"{type(error).__name__}: {error}", 1)
    except KeyboardInterrupt:
        leave(f"\n{came.name} came, and ended it early.", EXIT_CODES[came])
    for number in EXIT_CODES:
        signal.signal(number, signal.SIG_IGN)  # all is done


def check_folder(folder: Path) -> None:
    """Raises RecipeError unless a program may write into a folder, which need not exist yet."""
    if in_bucket(folder):
        return
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise RecipeError(f"{nearest} is a file; {folder} must be a folder.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise RecipeError(f"{nearest} cannot be written; choose another place than {folder}.")


def leave(message: str, code: int) -> NoReturn:
    """Ends the program with a message on stderr, if any, without waiting for any thread.

    `sys.exit` would wait for what is being compiled ahead.
    """
    with suppress(OSError, AttributeError):  # one of them may be closed, or its disk full
        if message:
            print(message, file=sys.stderr, flush=True)
        sys.stdout.flush()
    os._exit(code)


_OPTIONS = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
_EXAMPLE = Recipe(
    model="resnet50",
    data="folder:PATH",
    stages=(Stage("head", {"fc": 1e-3}, 5),),
    from_scratch=(Stage("all", {"*": 1e-2}, 5),),
)


def print_fields() -> None:
    """Prints the options that a recipe's fields are, with those of an example's one stage."""
    tyro.cli(Recipe, default=_EXAMPLE, args=["--help"], prog="CONFIG", config=_OPTIONS)


def read_with(path: str | os.PathLike[str], options: Sequence[str]) -> Recipe:
    """The recipe in a file, with `options` such as `--batch-size 64` before its own fields.

    Raises RecipeError as `jaxft.recipe_file.read`; what is no option, or no value of one, ends the
    program, as `--help` does.
    """
    return tyro.cli(
        Recipe,
        default=read(path),
        args=options,
        prog=f"{sys.argv[0]} {path}",  # whose help has these options
        config=_OPTIONS,
    )
