"""An end with one line for the seconds in which a script imports jax."""

import os
import signal

_EXIT_CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}  # as jaxft.command_line, not imported yet


def stop_at_once(message: str = "came; nothing has been done.") -> None:
    """Has SIGTERM and SIGINT print their name with a message, and end the program."""

    def stop(number: int, _: object) -> None:
        os.write(2, f"\n{signal.Signals(number).name} {message}\n".encode())
        os._exit(_EXIT_CODES[signal.Signals(number)])

    for number in _EXIT_CODES:
        signal.signal(number, stop)
