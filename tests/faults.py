"""Strikes a training run at a named point: raises an error, replaces a result, looks on.

    with failing("save", KilledError, at=6):  # no checkpoint of step 6 is begun
        finetune(recipe, workdir)

Tests and the child processes that kill themselves name points only. No other test module knows
which function of the package a point is, so that one that moves is changed here alone.
"""

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from jaxft import data, lr_finder
from jaxft.array_cache import ArrayCache
from jaxft.checkpoint import atomic, checksums, weights_only
from jaxft.checkpoint.checkpoints import Checkpoints
from jaxft.train import finetune, gradient_stage, train_stages, wise_finish, workdir
from jaxft.train.stage_program import StageProgram
from jaxft.train.state import Progress
from jaxft.train.train_stages import InBackground
from jaxft.train.trainer import Trainer


class Point(NamedTuple):
    """A function that a run calls.

    Attributes:
      owner, name: where the run looks the function up.
      key: returns the key of a call from its arguments; a test selects a call by its key. By
        default the calls are numbered from 1.
    """

    owner: Any
    name: str
    key: Callable | None = None


def _of_split(trainer, source, *_, **__):
    return "train" if source is trainer.splits.train else "val"


def _step_of_folder(folder, **_):
    name = folder.name.partition(".")[0]
    return int(name) if name.isdigit() else name


POINTS = {
    # The first process claims the workdir; returns why it cannot.
    "claim": Point(workdir, "ask_main_process"),
    # The parameters that an anchor pulls to are about to be saved.
    "save start": Point(weights_only, "save_weights"),
    # A stage is compiled, in the background; its number, from 1.
    "compile": Point(train_stages, "compile_stage", lambda program, _: program.index + 1),
    # The program that validates a run is about to be defined; it compiles at its first call.
    "evaluator": Point(finetune, "image_eval_step"),
    # The run begins to wait for the programs of a stage.
    "compiled": Point(InBackground, "result"),
    # The learning rate finder compiles its stage.
    "compile trial": Point(lr_finder.Trial, "compile"),
    # The gradient norms of a stage are about to be traced.
    "gradient norms": Point(StageProgram, "gradient_norms"),
    # The training batches of a stage are about to be read.
    "train batches": Point(data, "train_batches"),
    # A pass over the images of a split begins, to validate or for features; "train" or "val".
    "pass": Point(Trainer, "of_each_batch", _of_split),
    # The features of a frozen prefix have been computed and are about to be cached.
    "features": Point(ArrayCache, "add"),
    # Auto-RGN is about to set the learning rates of an epoch; the global step.
    "auto_rgn": Point(gradient_stage, "restart_with_auto_rgn", lambda *_, step, **__: step),
    # Training batches of one call are about to be sent to the devices.
    "send": Point(gradient_stage, "sent"),
    # A step has been taken and is about to be counted; its global number, from 1.
    "step": Point(Progress, "after_step", lambda progress: progress.step + 1),
    # The run looks whether a signal has come.
    "stop asked": Point(Trainer, "stop_asked"),
    # Validation begins, the run's start included.
    "evaluate": Point(Trainer, "evaluate"),
    # The start and the end of a stage are about to be averaged; the alpha.
    "average": Point(wise_finish, "interpolate", lambda start, end, alpha: alpha),
    # A checkpoint is about to be written; its step.
    "save": Point(Checkpoints, "save", lambda _, step, *__, **___: step),
    # The arrays of a checkpoint are written, but it is not yet renamed; its step.
    "seal": Point(checksums, "seal", _step_of_folder),
    # A stage has ended; its last checkpoint may still be written. The stage's name.
    "stage end": Point(train_stages, "epilogue", lambda plan, *_, **__: plan.stage.name),
    # Images become the network's input, within a compiled program.
    "normalize": Point(data.Preprocessing, "normalize"),
    # A file is about to be replaced atomically; its name.
    "write": Point(atomic, "write", lambda path, *_: Path(path).name),
}


def replaced(point, function):
    """Returns a context that calls `function(real, *arguments)` in place of a point's function."""
    owner, name, _ = POINTS[point]
    real = getattr(owner, name)

    def instead(*args, **kwargs):
        return function(real, *args, **kwargs)

    return mock.patch.object(owner, name, instead)


def before(point, action, at=None):
    """Returns a context that calls `action(*arguments)` before the function of a point.

    Args:
      point: a key of `POINTS`.
      action: receives the arguments of the call.
      at: key of the call to act before, see `Point`; None: each call.
    """
    numbers = count(1)
    key = POINTS[point].key or (lambda *_, **__: next(numbers))

    def act_and_call(real, *args, **kwargs):
        if at in (None, key(*args, **kwargs)):
            action(*args, **kwargs)
        return real(*args, **kwargs)

    return replaced(point, act_and_call)


def failing(point, error, at=None):
    """Returns a context in which calls of a point raise an error; see `before`."""

    def fail(*_, **__):
        raise error

    return before(point, fail, at)
