"""Importing this ends the program with one line at SIGTERM or SIGINT.

For the seconds in which a script imports jax; later `jaxft.command_line.run` handles them.
"""

import os
import signal

EXIT_CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}


def stop(number: int, _: object) -> None:
    os.write(2, f"\n{signal.Signals(number).name} came; nothing has been done.\n".encode())
    os._exit(EXIT_CODES[signal.Signals(number)])


for number in EXIT_CODES:
    signal.signal(number, stop)
