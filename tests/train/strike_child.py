"""Sends a process a signal at one exact point, found by Python's audit events.

    python tests/train/strike_child.py SIGNAL EVENT NAME COUNT SCRIPT ARGUMENTS...

EVENT is `import`, `open` or `os.rename` (whose new name counts). The signal comes with the COUNT-th
event whose name contains NAME.
"""

import os
import runpy
import signal
import sys

_point = None


def arm(number, event, name, count=1):
    """Sends the signal once at the point."""
    global _point
    _point = [number, event, name, count]


def disarm():
    """Returns whether the point was reached."""
    global _point
    reached, _point = _point is None, None
    return reached


def meet(event, name):
    """Reports an event, also from tests for events that Python does not audit."""
    global _point
    if _point is None or _point[1] != event or _point[2] not in name:
        return
    _point[3] -= 1
    if _point[3] == 0:
        number, _point = _point[0], None
        os.kill(os.getpid(), number)


def _audited(event, arguments):
    if _point is not None and event == _point[1]:
        meet(event, str(arguments[1 if event == "os.rename" else 0]))


sys.addaudithook(_audited)

if __name__ == "__main__":
    name, event, part, count, script = sys.argv[1:6]
    sys.argv = sys.argv[5:]
    sys.path[0] = os.path.dirname(script)
    arm(getattr(signal, name), event, part, int(count))
    runpy.run_path(script, run_name="__main__")
