"""Sends signals to a run at one exact point, for the tests that kill and stop runs.

    python tests/train/mortal_child.py SIGNAL[,SIGNAL] POINT KEY ARGUMENTS-OF-FINETUNE...

The process sends them to itself before the call KEY of a point in `faults.POINTS`. At the point
`compiled`, the programs that the run waits for never compile.
"""

import os
import runpy
import signal
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from faults import before

SCRIPT = Path(__file__).parents[2] / "scripts/finetune.py"


def main(signals, point, key, *arguments):
    at = int(key) if key.isdigit() else key

    def send(*_, **__):
        for name in signals.split(","):
            os.kill(os.getpid(), getattr(signal, name))

    def hang(*_, **__):
        threading.Event().wait()

    sys.argv = [str(SCRIPT), *arguments]
    sys.path[0] = str(SCRIPT.parent)
    hanging = before("compile", hang, at) if point == "compiled" else nullcontext()
    with hanging, before(point, send, at):
        runpy.run_path(str(SCRIPT), run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
