"""Calls commands of the `jaxft` program in the process of a test."""

import os
import signal
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from io import StringIO
from typing import NamedTuple
from unittest.mock import patch

import jax

from jaxft.cli.commands import COMMANDS

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Done(NamedTuple):
    """The end of a command, with the names of `subprocess.CompletedProcess`."""

    returncode: int
    stdout: str
    stderr: str


def call(command, *arguments):
    """Runs a command on a terminal of 80 columns; restores the state of the process.

    `finetune` does not look for other processes: this process already uses JAX.
    """
    alone = ("--processes", "1") if command == "finetune" else ()
    run = import_module(f"jaxft.cli.{COMMANDS[command].module}").run
    with state_restored(), redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        os.environ["COLUMNS"] = "80"
        code = run([*map(str, arguments), *alone])
    return Done(code, out.getvalue(), err.getvalue())


@contextmanager
def state_restored():
    """Restores environment, import path and JAX's options; asserts that signal handlers are."""
    handlers = [signal.getsignal(number) for number in _SIGNALS]
    options = dict(jax.config.values)
    with patch.dict(os.environ), patch.object(sys, "path", list(sys.path)):
        yield
    for name, value in options.items():
        if jax.config.values[name] != value:
            jax.config.update(name, value)
    assert [signal.getsignal(number) for number in _SIGNALS] == handlers
