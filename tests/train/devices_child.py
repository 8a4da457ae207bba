"""What test_devices.py runs on virtual devices: command lines of scripts/finetune.py.

    python tests/train/devices_child.py LINES [COORDINATOR PROCESSES PROCESS]

One after another in one process, which starts but once. LINES is JSON: of each line its arguments,
and the steps after which this process gets a SIGTERM (0: never), which ends the list too. An error
ends its line alone. What a device holds of a step's arguments is printed.
"""

import json
import os
import runpy
import signal
import sys
from pathlib import Path

from jaxft import distributed, processes
from jaxft.report.console import Bar
from jaxft.train.stage_program import StageProgram

SCRIPT = Path(__file__).parents[2] / "scripts/finetune.py"


def main(lines, *joining):
    options = ("--coordinator", "--processes", "--process")
    joining = [text for pair in zip(options, joining, strict=False) for text in pair]
    finetune = runpy.run_path(str(SCRIPT))["main"]
    leave = finetune.__globals__["leave"]

    def leave_if_stopped(message, code):
        if code == 1:  # an error: on to the next command line
            sys.exit(message)
        leave(message, code)

    finetune.__globals__["leave"] = leave_if_stopped
    distributed.LARGE = 2**12  # of 2**18: this network has none larger than 2**16
    distributed._PARTING = 2  # of 20 seconds
    advance, steps = Bar.advance, 0

    def counted(bar, loss, taken):
        nonlocal steps
        if 0 < steps <= taken:
            os.kill(os.getpid(), signal.SIGTERM)
        steps -= taken
        advance(bar, loss, taken)

    Bar.advance = counted
    compile = StageProgram.compile

    def weighed(program, shapes):
        compiled = compile(program, shapes)
        if processes.is_first() and compiled.step:
            held = compiled.step.memory_analysis().argument_size_in_bytes
            stage, sharding = program.plan.stage.name, program.devices.sharding
            print(f"arguments of {stage}, {sharding}: {held} bytes", flush=True)
        return compiled

    StageProgram.compile = weighed
    code = 0
    for arguments, steps in json.loads(lines):  # noqa: B007
        try:
            finetune([*arguments, *(joining or ("--processes", "1"))])
        except SystemExit as error:
            print(error, file=sys.stderr)
            code = 1
    sys.exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
