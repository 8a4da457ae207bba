"""Sends signals to a run at one exact point, for `test_kills.py` and `test_signals.py`.

    python tests/train/mortal_child.py SIGNAL[,SIGNAL] POINT ARGUMENTS-OF-FINETUNE...

The process sends them to itself at the point, which is one of

    step:N      step N is done
    save:N      the checkpoint of step N is written, but not yet renamed
    stage:NAME  the stage has ended; its last checkpoint is being written
    score:N     validation begins for the Nth time, the run's start included
    compile:N   the run begins to wait for the programs of its Nth stage, which never compile
"""

import os
import runpy
import signal
import sys
import threading
from pathlib import Path

from jaxft.checkpoint import checksums
from jaxft.report.console import Console
from jaxft.train.stage_program import StageProgram
from jaxft.train.state import Progress
from jaxft.train.train_stages import InBackground
from jaxft.train.trainer import Trainer

SCRIPT = Path(__file__).parents[2] / "scripts/finetune.py"


def strike_before(owner, name, point_reached):
    """Sends the signals before the first call of `owner.name` for which `point_reached` is true.

    `point_reached` gets the number of the call, from 1, and its arguments.
    """
    real, calls = getattr(owner, name), []

    def struck(*args, **kwargs):
        calls.append(name)
        if point_reached(len(calls), *args):
            for number in signals:
                os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    setattr(owner, name, struck)


def never_compile(index):
    real = StageProgram.compile

    def compile_or_hang(program, shapes):
        if program.index == index:
            threading.Event().wait()
        return real(program, shapes)

    StageProgram.compile = compile_or_hang


if __name__ == "__main__":
    signals = [getattr(signal, name) for name in sys.argv[1].split(",")]
    kind, _, at = sys.argv[2].partition(":")
    if kind == "step":
        strike_before(Progress, "after_step", lambda _, progress: progress.step + 1 == int(at))
    elif kind == "save":
        strike_before(checksums, "seal", lambda _, folder: folder.name.startswith(f"{at}."))
    elif kind == "stage":
        strike_before(Console, "say", lambda _, __, text: text.startswith(f"Stage {at!r} ended"))
    elif kind == "score":
        strike_before(Trainer, "evaluate", lambda call, *_: call == int(at))
    else:
        never_compile(int(at) - 1)
        strike_before(InBackground, "result", lambda call, *_: call == int(at))
    sys.argv = [str(SCRIPT), *sys.argv[3:]]
    sys.path[0] = str(SCRIPT.parent)
    runpy.run_path(str(SCRIPT), run_name="__main__")
