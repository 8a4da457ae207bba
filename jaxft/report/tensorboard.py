"""TensorBoard's event file, on a disk or in a bucket."""

import os
import socket
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from etils import epath

from jaxft.checkpoint.atomic import in_bucket


class EventFile:
    """An event file in `folder`; TensorBoard hides what older ones hold from `purge_step` on.

    Not tensorboardX's `SummaryWriter`: its thread dies of a full disk and takes no more, and for a
    bucket it wants another client library.
    """

    def __init__(self, folder: epath.Path, *, purge_step: int) -> None:
        with _without_torch():
            from tensorboardX.proto.event_pb2 import Event, SessionLog

        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._path = folder / name
        self._records, self._written = bytearray(), 0
        start = SessionLog(status=SessionLog.START)
        self._append(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._append(Event(wall_time=time.time(), step=purge_step, session_log=start))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Notes scalars by their tags, for the next flush."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._append(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))

    def flush(self) -> None:
        """Writes what is not written yet; after an OSError the next call goes on from there."""
        if in_bucket(self._path):  # an object cannot grow
            self._path.write_bytes(bytes(self._records))
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self._path, os.O_CREAT | os.O_WRONLY, 0o644)
        try:
            while missing := self._records[self._written :]:
                self._written += os.pwrite(file, missing, self._written)
        finally:
            os.close(file)

    def _append(self, event: Any) -> None:
        from tensorboardX.record_writer import masked_crc32c

        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        for part in (length, data):
            self._records += part + struct.pack("<I", masked_crc32c(part))


@contextmanager
def _without_torch() -> Iterator[None]:
    """No import finds torch, unless it is there already.

    tensorboardX imports it, where it is installed, for an annotation: a second or two.
    """
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]
