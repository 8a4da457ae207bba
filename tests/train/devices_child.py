"""Runs command lines of scripts/finetune.py on virtual devices, for test_devices.py.

    python tests/train/devices_child.py LINES [COORDINATOR PROCESSES PROCESS]

One after another in one process, which starts but once. LINES is JSON: of each line its arguments,
and the steps after which this process gets a SIGTERM (0: never), which ends the list too. An error
ends its line alone. What a device holds of a step's arguments is printed.
"""

import gc
import json
import os
import signal
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from faults import before, replaced

import jaxft.devices
from jaxft import distributed
from jaxft.cli.finetune import run
from jaxft.cli.process import exit_process


def main(lines, *joining):
    options = ("--coordinator", "--processes", "--process")
    joining = [text for pair in zip(options, joining, strict=False) for text in pair]
    jaxft.devices.LARGE = 2**12  # of 2**18: this network has none larger than 2**16
    distributed._SHUTDOWN_TIMEOUT = 2  # of 20 seconds
    gc.set_threshold(100_000, 50, 100)  # collections walk over everything that jax has traced
    steps = 0

    def count(_):
        nonlocal steps
        steps -= 1
        if steps == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    def weighed(compile_stage, program, shapes):
        compiled = compile_stage(program, shapes)
        if distributed.is_main_process() and compiled.step:
            held = compiled.step.memory_analysis().argument_size_in_bytes
            stage, sharding = program.plan.stage.name, program.devices.sharding
            print(f"arguments of {stage}, {sharding}: {held} bytes", flush=True)
        return compiled

    codes = []
    with before("step", count), replaced("compile", weighed):
        for arguments, steps in json.loads(lines):  # noqa: B007
            codes.append(run([*arguments, *(joining or ("--processes", "1"))]))
            if codes[-1] > 1:  # stopped; after an error the next command line runs
                exit_process(codes[-1])
    sys.exit(max(codes))


if __name__ == "__main__":
    main(*sys.argv[1:])
